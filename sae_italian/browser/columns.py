"""The columns of the list of latents.

To add one: a row of COLUMNS here, and its words in `base/labels.yaml` under `column` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import FiniteFloat

from sae_italian.autointerp.explainers.choose import EXPLAINER, LOOKUP

if TYPE_CHECKING:
    from sae_italian.autointerp.store import Explanation
    from sae_italian.browser.source import LatentSource

RowRecord = dict[str, Any]  # one latent in the list: a value of each column
LABEL_SHOWN = 0.5  # F1 from which a label is shown on a latent's row
TOKENS_SHOWN = 5


class Column(NamedTuple):
    """One field of a latent's row: its type, its value, and whether and how the list shows it as a column."""

    type: Any
    value: Callable[[LatentSource, int], Any]
    show: str = ""
    """integer, density, activation, fixed, signed or score; empty: the row needs it but has no column of its own."""
    range: bool = False
    """Whether the list can be narrowed to a range of it."""


def _gain(source: LatentSource, latent: int) -> float | None:
    own, lookup = (source.score(explainer, "detection", latent).value for explainer in (EXPLAINER, LOOKUP))
    return None if own is None or lookup is None else own - lookup


def _status(source: LatentSource, latent: int) -> str:
    """Return why there is no explanation; empty where there is one."""
    found = source.explained(EXPLAINER, latent)
    return "not explained" if found is None else "" if found.status == "ok" else found.status


def _kind(source: LatentSource, latent: int) -> str:
    found = source.explained(EXPLAINER, latent)
    return found.rule["family"] if found and found.rule else ""


def _said(found: Explanation | None, language: str) -> str:
    return getattr(found, f"text_{language}") if found else ""


def _gold(source: LatentSource, latent: int) -> list[str]:
    return [label["label"] for label in source.labels.get(latent, []) if (label["f1"] or 0) >= LABEL_SHOWN]


def _tokens(source: LatentSource, latent: int) -> list[str]:
    return [source.strings[token] for token in source.stats["token_ids"][latent][:TOKENS_SHOWN]]


COLUMNS: dict[str, Column] = {
    "latent": Column(int, lambda _, i: i, "integer"),  # 0 to d_sae - 1, in order
    # share of tokens on which it is active, 0 to 1
    "density": Column(FiniteFloat, lambda source, i: float(source.stats["density"][i]), "density", range=True),
    # largest activation seen; 0 when dead
    "max": Column(FiniteFloat, lambda source, i: float(source.stats["max"][i]), "activation", range=True),
    "n_active": Column(int, lambda source, i: int(source.stats["count"][i])),  # tokens on which it is active
    "explanation_it": Column(
        str, lambda source, i: _said(source.explained(EXPLAINER, i), "it")
    ),  # the rule's, which the scores are of
    "explanation_en": Column(str, lambda source, i: _said(source.explained(EXPLAINER, i), "en")),
    "llm_it": Column(
        str, lambda source, i: _said(source.llm_explanation(i), "it")
    ),  # an LLM's explanation; empty without one
    "llm_en": Column(str, lambda source, i: _said(source.llm_explanation(i), "en")),
    "kind": Column(str, _kind),  # token, previous, bigram, context, ...; empty when unexplained
    # balanced accuracy, 0 to 1, chance 0.5, and its 95 % interval
    "detection": Column(
        FiniteFloat | None, lambda source, i: source.score(EXPLAINER, "detection", i).value, "score", range=True
    ),
    "detection_lo": Column(FiniteFloat | None, lambda source, i: source.score(EXPLAINER, "detection", i).lo),
    "detection_hi": Column(FiniteFloat | None, lambda source, i: source.score(EXPLAINER, "detection", i).hi),
    "fuzzing": Column(FiniteFloat | None, lambda source, i: source.score(EXPLAINER, "fuzzing", i).value, "fixed"),
    # detection minus that of the token lookup, -1 to 1
    "gain": Column(FiniteFloat | None, _gain, "signed", range=True),
    "top_tokens": Column(list[str], _tokens),
    "gold": Column(list[str], _gold),  # labels that this latent detects
    "dead": Column(bool, lambda source, i: not source.stats["count"][i]),
    "x": Column(FiniteFloat | None, lambda source, i: source.place(i, 0)),  # on the map; None without the decoder
    "y": Column(FiniteFloat | None, lambda source, i: source.place(i, 1)),
    "status": Column(str, _status),
}
