"""The records of the latent browser: what the page needs, and nothing of how it was computed.

All records are plain JSON. Every float is finite or None, and None means "not measured", never 0. Texts ending in
`_it` and `_en` are the two languages of the page; the rest is shown as it is. Unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from pydantic import ConfigDict, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from sae_italian.base.errors import DataError

STRICT = ConfigDict(extra="forbid")


class MetricRecord(TypedDict):
    """One number of the run with its interval, as in the evaluation card."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    name: str  # machine name, unique within its table
    label_it: str
    label_en: str
    value: FiniteFloat | None  # in `unit`: 97.3 with "%" reads 97.3 %
    lo: FiniteFloat | None  # 95 % interval, same unit; both ends or neither
    hi: FiniteFloat | None
    note_it: str  # one line of how it was taken; may be empty
    note_en: str
    unit: Literal["", "%", "nats"]


class GoldRecord(TypedDict):
    """How well the best latent finds one gold label, on held-out documents."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    label: str  # e.g. "gender=f"
    category: str  # e.g. "gender"; labels are shown in groups of one category
    n: int  # positive tokens in the held-out documents
    latent: int | None  # None when no latent was chosen
    f1: FiniteFloat | None  # 0 to 1, as the next two
    precision: FiniteFloat | None
    recall: FiniteFloat | None


class RunRecord(TypedDict):
    """What was run: the facts at the top of the page."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    title: str
    created: str  # ISO 8601, UTC
    version: str  # of sae_italian
    model: str
    model_note: str  # licence, size, tuned or base; may be empty
    sae: str  # as in Llama Scope: L14R-32x
    hook_name: str  # TransformerLens' legacy name
    d_in: int
    d_sae: int
    k: int | None  # None when the SAE is not TopK
    corpus: str
    n_tokens: int  # tokens in the feature cache
    context_size: int  # tokens per window
    n_documents: int
    metrics: list[MetricRecord]
    controls: list[MetricRecord]
    gold: list[GoldRecord]  # empty when the corpus carries no gold labels


class RowRecord(TypedDict):
    """One latent in the list."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    latent: int  # 0 to d_sae - 1, unique
    density: FiniteFloat  # share of tokens on which it is active, 0 to 1
    max: FiniteFloat  # largest activation seen; 0 when dead
    n_active: int  # tokens on which it is active
    explanation_it: str  # the rule's, which the scores below are of
    explanation_en: str
    llm_it: str  # an LLM's explanation; empty without one
    llm_en: str
    kind: str  # token, previous, bigram, context, shape, ...; empty when unexplained
    detection: FiniteFloat | None  # balanced accuracy, 0 to 1, chance 0.5
    detection_lo: FiniteFloat | None  # 95 % interval
    detection_hi: FiniteFloat | None
    fuzzing: FiniteFloat | None  # balanced accuracy, 0 to 1, chance 0.5
    gain: FiniteFloat | None  # detection minus that of the token lookup, -1 to 1
    top_tokens: list[str]  # at most 5 are shown
    gold: list[str]  # labels that this latent detects
    dead: bool
    x: FiniteFloat | None  # place on the map of latents; None without the decoder
    y: FiniteFloat | None
    status: str  # empty, or why there is no explanation: "too few activations", "not explained"


class ExplanationRecord(TypedDict):
    """One explanation of a latent; its scores are those of `CardRecord.scores` with the same explainer."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    explainer: str  # rules, token-lookup (the control, last), llm:MODEL:LANGUAGE...
    kind: str  # rule or llm
    status: str  # ok, or why there is no text
    text_it: str
    text_en: str
    now: str  # when it was made on demand (ISO 8601), beside a run's work; empty for a run's


class ScoreRecord(TypedDict):
    """One score of one explanation."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    scorer: str  # detection, fuzzing
    judge: str  # rule, or a model's name
    negatives: str  # where the negatives come from: random, silent-token, ...
    metric: str  # balanced_accuracy, tpr, tnr, f1, auroc; all 0 to 1
    value: FiniteFloat | None
    lo: FiniteFloat | None
    hi: FiniteFloat | None
    n_pos: int
    n_neg: int
    explainer: str  # token-lookup is the control; the others are explanations


class HistogramRecord(TypedDict):
    """Non-zero activations in bins; `edges` is one longer than `counts`, or both are empty."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    edges: list[FiniteFloat]
    counts: list[int]


class TokenValueRecord(TypedDict):
    """A vocabulary token and the logits that the latent's decoder direction adds to it."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    token: str
    value: FiniteFloat


class TokenShareRecord(TypedDict):
    """A token on which the latent fires and its share of the activation mass, 0 to 1."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    token: str
    share: FiniteFloat


class ContextRecord(TypedDict):
    """A passage; the segments' texts, concatenated, are the true text, character for character."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    doc_id: str
    source: str
    max: FiniteFloat  # largest activation in the passage
    segments: list[tuple[str, FiniteFloat]]  # (text, activation); 0 where the latent is silent


class GroupRecord(TypedDict):
    """Passages whose largest activation lies between `lo` and `hi`; None on both for the strongest ones."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    name_it: str
    name_en: str
    lo: FiniteFloat | None
    hi: FiniteFloat | None
    contexts: list[ContextRecord]


class LabelRecord(TypedDict):
    """How well this latent finds a gold or UD label; 0 to 1."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    label: str  # gender=f+number=pl, or UD's own names
    source: str  # where the labels come from: gold, a treebank, ...
    f1: FiniteFloat | None
    lo: FiniteFloat | None  # 95 % interval of F1; both ends or neither
    hi: FiniteFloat | None
    precision: FiniteFloat | None
    recall: FiniteFloat | None
    n: int | None  # positive tokens in the held-out documents


class NeighbourRecord(TypedDict):
    """Another latent and how near it is: a cosine of decoder directions, or a Jaccard index of active tokens."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    latent: int
    value: FiniteFloat


class SourceRecord(TypedDict):
    """A source of the corpus: how many of its documents and tokens the latent is active on."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    source: str
    documents: int
    tokens: int


class CardRecord(TypedDict):
    """What is loaded when one latent is opened; what its row already says is not repeated."""

    __pydantic_config__ = STRICT  # pyright: ignore[reportGeneralTypeIssues]
    latent: int
    explanations: list[ExplanationRecord]
    scores: list[ScoreRecord]
    histogram: HistogramRecord
    logits: HistogramRecord  # over the whole vocabulary; empty without the decoder
    positions: list[FiniteFloat]  # share of the activations in each tenth of the window; empty when dead
    promoted: list[TokenValueRecord]  # strongest first
    suppressed: list[TokenValueRecord]  # strongest first, values negative
    decoder: list[NeighbourRecord]  # nearest first
    cofiring: list[NeighbourRecord]  # nearest first
    groups: list[GroupRecord]
    tokens: list[TokenShareRecord]
    sources: list[SourceRecord]  # most documents first; at most 12
    more_sources: int  # how many further sources the latent is active on
    labels: list[LabelRecord]  # best first
    rule: dict[str, Any] | None  # machine-readable rule, shown as JSON


@cache
def _adapter(record: type) -> TypeAdapter[Any]:
    return TypeAdapter(record)


def _check(record: type, value: Any, name: Callable[[], str]) -> Any:
    try:
        return _adapter(record).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        found = repr(first["input"])[:80]
        raise DataError(f"{name()}, field {where!r}: {first['msg']}; found {found}.") from None


def check_run(run: RunRecord) -> RunRecord:
    """Return `run` as plain JSON values. Raises: DataError, naming the first field that does not fit."""
    return _check(RunRecord, run, lambda: "run record")


def check_row(row: RowRecord) -> RowRecord:
    """Return `row` as plain JSON values. Raises: DataError, naming the latent and the field."""
    return _check(RowRecord, row, lambda: f"row of latent {row.get('latent')!r}")


def check_rows(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the columns of all rows as plain JSON values; row i is latent i.

    Raises: DataError, naming the latent and the field.
    """
    fields = {name for name in RowRecord.__annotations__ if not name.startswith("__")}
    if wrong := sorted(fields ^ set(columns)):
        what = "is missing" if wrong[0] in fields else "is not a field"
        raise DataError(f"rows of latents: column {wrong[0]!r} {what}; the columns are those of RowRecord.")
    if len({len(values) for values in columns.values()}) != 1:
        raise DataError("rows of latents: the columns differ in length.")
    checked: dict[str, list[Any]] = {name: [] for name in columns}
    for latent, values in enumerate(zip(*columns.values(), strict=True)):
        row: Any = check_row(dict(zip(columns, values, strict=True)))  # pyright: ignore[reportArgumentType]
        if row["latent"] != latent:
            raise DataError(
                f"row of latent {row['latent']}: stands at place {latent}. Give every latent once, in order."
            )
        for name, value in row.items():
            checked[name].append(value)
    return checked


def check_card(card: CardRecord) -> CardRecord:
    """Return `card` as plain JSON values. Raises: DataError, naming the latent and the field."""
    checked = _check(CardRecord, card, lambda: f"card of latent {card.get('latent')!r}")
    for name in ("histogram", "logits"):
        n_edges, n_counts = len(checked[name]["edges"]), len(checked[name]["counts"])
        if n_edges != (n_counts + 1 if n_counts else 0):
            raise DataError(
                f"card of latent {checked['latent']}, field {name!r}: {n_edges} edges for {n_counts} counts; "
                "edges is one longer than counts, or both are empty."
            )
    return checked


def check_groups(groups: list[GroupRecord]) -> list[GroupRecord]:
    """Return groups of passages as plain JSON values. Raises: DataError, naming the field."""
    return [_check(GroupRecord, group, lambda: "group of passages") for group in groups]
