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


def _score(scorer: str, end: str) -> Callable[[LatentSource, int], float | None]:
    return lambda source, latent: getattr(source.score(EXPLAINER, scorer, latent), end)


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


Number = FiniteFloat | None
COLUMNS: dict[str, Column] = {
    "latent": Column(int, lambda _, i: i, "integer"),  # 0 to d_sae - 1, in order
    # share of tokens on which it is active, 0 to 1; the largest activation seen, 0 when dead; tokens on which it is active
    "density": Column(FiniteFloat, lambda s, i: float(s.stats["density"][i]), "density", range=True),
    "max": Column(FiniteFloat, lambda s, i: float(s.stats["max"][i]), "activation", range=True),
    "n_active": Column(int, lambda s, i: int(s.stats["count"][i])),
    # the rule's, which the scores are of; an LLM's, empty without one
    "explanation_it": Column(str, lambda s, i: _said(s.explained(EXPLAINER, i), "it")),
    "explanation_en": Column(str, lambda s, i: _said(s.explained(EXPLAINER, i), "en")),
    "llm_it": Column(str, lambda s, i: _said(s.llm_explanation(i), "it")),
    "llm_en": Column(str, lambda s, i: _said(s.llm_explanation(i), "en")),
    "kind": Column(str, _kind),  # token, previous, bigram, context, ...; empty when unexplained
    # balanced accuracy, 0 to 1, chance 0.5, and its 95 % interval
    "detection": Column(Number, _score("detection", "value"), "score", range=True),
    "detection_lo": Column(Number, _score("detection", "lo")),
    "detection_hi": Column(Number, _score("detection", "hi")),
    "fuzzing": Column(Number, _score("fuzzing", "value"), "fixed"),
    # detection minus that of the token lookup, -1 to 1
    "gain": Column(Number, _gain, "signed", range=True),
    "top_tokens": Column(list[str], _tokens),
    "gold": Column(list[str], _gold),  # labels that this latent detects
    "dead": Column(bool, lambda s, i: not s.stats["count"][i]),
    "x": Column(Number, lambda s, i: s.place(i, 0)),  # on the map; None without the decoder
    "y": Column(Number, lambda s, i: s.place(i, 1)),
    "status": Column(str, _status),
}
