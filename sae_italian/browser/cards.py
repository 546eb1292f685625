"""Turn a cache, its scores and its gold labels into the records of the browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sae_italian import __version__
from sae_italian.autointerp.examples import Activity, ExampleSource
from sae_italian.autointerp.run import EXPLAINER, LOOKUP, token_strings
from sae_italian.autointerp.store import Store
from sae_italian.autointerp.summary import HEADLINE
from sae_italian.browser.schema import (
    CardRecord,
    ContextRecord,
    GoldRecord,
    GroupRecord,
    MetricRecord,
    RowRecord,
    RunRecord,
    ScoreRecord,
)
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.models import parse_hook_name
from sae_italian.storage import utc_now

SHOWN_METRICS = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc")
GOLD_SHOWN = 0.5  # F1 from which a label is shown on a latent's card
N_TOP, N_PER_BAND, N_BANDS = 12, 4, 5


@dataclass(frozen=True)
class Report:
    """What a report is made from. `gold` are the rows of `analysis.gold_table` as plain dicts."""

    cache: FeatureCache
    tokenizer: Any
    store: Path | None
    title: str
    metrics: list[MetricRecord]
    controls: list[MetricRecord]
    gold: list[dict[str, Any]]
    model_note: str = ""


class CardMaker:
    """Makes the rows of the list and the cards of the latents, one at a time."""

    def __init__(self, report: Report):
        self.report, self.cache = report, report.cache
        self.source = ExampleSource(report.cache)
        self.stats = report.cache.statistics
        self.strings = token_strings(report.tokenizer, len(report.tokenizer))
        self.gold_of: dict[int, list[dict[str, Any]]] = {}
        for result in report.gold:
            if result["f1"] >= GOLD_SHOWN:
                self.gold_of.setdefault(result["latent"], []).append(result)
        self.explanations: dict[int, Any] = {}
        self.detection: dict[int, dict[str, Any]] = {}
        self.values: dict[tuple[str, str], dict[int, float]] = {}
        if report.store is not None:
            with Store(report.store, {}) as store:
                self.explanations = {latent: e for latent, (_, e) in store.explanations(EXPLAINER).items()}
                for explainer in (EXPLAINER, LOOKUP):
                    for scorer in ("detection", "fuzzing"):
                        self.values[explainer, scorer] = store.values(
                            explainer=explainer,
                            control="",
                            scorer=scorer,
                            metric="balanced_accuracy",
                            negatives=HEADLINE[scorer],
                        )
                self.scores = {latent: store.scores_of(latent) for latent in self.explanations}

    def run_record(self) -> RunRecord:
        manifest = self.cache.manifest
        return RunRecord(
            title=self.report.title,
            created=utc_now(),
            version=__version__,
            model=manifest.model,
            model_note=self.report.model_note,
            sae=short_name(manifest),
            hook_name=manifest.hook_name,
            d_in=manifest.d_in,
            d_sae=manifest.d_sae,
            k=manifest.k,
            corpus=manifest.corpus,
            n_tokens=self.cache.n_positions,
            context_size=manifest.context_size,
            n_documents=self.cache.n_documents,
            metrics=self.report.metrics,
            controls=self.report.controls,
            gold=[
                GoldRecord(
                    **{key: result[key] for key in ("label", "category", "n", "latent", "f1", "precision", "recall")}
                )
                for result in self.report.gold
            ],
        )

    def rows(self) -> list[RowRecord]:
        return [self.row(latent) for latent in range(self.cache.manifest.d_sae)]

    def row(self, latent: int) -> RowRecord:
        explanation = self.explanations.get(latent)
        own = self.values.get((EXPLAINER, "detection"), {}).get(latent)
        lookup = self.values.get((LOOKUP, "detection"), {}).get(latent)
        interval = next(
            (
                score
                for score in self._scores(latent)
                if (score["scorer"], score["metric"]) == ("detection", "balanced_accuracy")
                and score["negatives"] == HEADLINE["detection"]
            ),
            {},
        )
        count = int(self.stats["count"][latent])
        status = explanation.status if explanation else "not explained"
        return RowRecord(
            latent=latent,
            density=float(self.stats["density"][latent]),
            max=float(self.stats["max"][latent]),
            n_active=count,
            explanation_it=explanation.text_it if explanation else "",
            explanation_en=explanation.text_en if explanation else "",
            kind=explanation.rule["family"] if explanation and explanation.rule else "",
            detection=own,
            detection_lo=interval.get("lo"),
            detection_hi=interval.get("hi"),
            fuzzing=self.values.get((EXPLAINER, "fuzzing"), {}).get(latent),
            gain=None if own is None or lookup is None else own - lookup,
            top_tokens=[self.strings[i] for i in self.stats["token_ids"][latent][:5]],
            gold=[result["label"] for result in self.gold_of.get(latent, [])],
            dead=count == 0,
            status="" if status == "ok" else status,
        )

    def _scores(self, latent: int, explainer: str = EXPLAINER) -> list[dict[str, Any]]:
        """Return the latent's own detection and fuzzing rows, without the controls."""
        rows = self.scores.get(latent, []) if self.explanations else []
        return [
            row
            for row in rows
            if row["control"] == ""
            and row["explainer"] == explainer
            and row["scorer"] in HEADLINE
            and row["metric"] in SHOWN_METRICS
            and not row["judge"].startswith("always-")
        ]

    def cards(self) -> Iterator[CardRecord]:
        for latent in range(self.cache.manifest.d_sae):
            yield self.card(latent)

    def card(self, latent: int) -> CardRecord:
        stats, explanation = self.stats, self.explanations.get(latent)
        largest = float(stats["max"][latent])
        counts = stats["histogram"][latent].tolist() if largest else []
        return CardRecord(
            latent=latent,
            scores=[_score(row) for explainer in (EXPLAINER, LOOKUP) for row in self._scores(latent, explainer)],
            histogram={"edges": np.linspace(0, largest, len(counts) + 1).tolist() if counts else [], "counts": counts},
            promoted=self._tokens(latent, "promoted"),
            suppressed=self._tokens(latent, "suppressed"),
            groups=self._groups(self.source.activity(latent)),
            tokens=[
                {"token": self.strings[token], "share": float(share)}
                for token, share in zip(stats["token_ids"][latent], stats["token_shares"][latent], strict=True)
            ],
            gold=[
                {"label": r["label"], "f1": r["f1"], "precision": r["precision"], "recall": r["recall"]}
                for r in self.gold_of.get(latent, [])
            ],
            rule=self._rule(explanation),
        )

    def _rule(self, explanation: Any, shown: int = 20) -> dict[str, Any] | None:
        """Return the rule for a reader: tokens instead of ids, the heaviest only."""
        if explanation is None or explanation.rule is None:
            return None
        rule = explanation.rule
        numbers = {name: round(rule[name], 4) for name in ("threshold", "precision", "recall")}
        return {"family": rule["family"], **numbers, "keys": rule["shown"][:shown]}

    def _tokens(self, latent: int, which: str) -> list[Any]:
        ids, values = self.stats[f"{which}_ids"][latent], self.stats[f"{which}_values"][latent]
        return [{"token": self.strings[i], "value": float(value)} for i, value in zip(ids, values, strict=True)]

    # --- contexts ----------------------------------------------------------------------------------------------------

    def _groups(self, activity: Activity) -> list[GroupRecord]:
        """Return the strongest passages, then some from each fifth of the passages by strength, no passage twice."""
        if len(activity.position) == 0:
            return []
        maxima = np.zeros(len(self.source.start))
        maxima[activity.active] = activity.maximum
        segments = activity.active
        segments = segments[np.sort(np.unique(self.source.content[segments], return_index=True)[1])]
        segments = segments[np.argsort(-maxima[segments], kind="stable")]
        top, rest = segments[:N_TOP], segments[N_TOP:]
        groups = [self._group(activity, top, "Più forti", "Strongest", None)]
        for band, part in enumerate(np.array_split(rest, N_BANDS)):
            if len(part):
                names = f"Fascia {band + 1} di {N_BANDS}", f"Band {band + 1} of {N_BANDS}"
                bounds = float(maxima[part].min()), float(maxima[part].max())
                chosen = part[np.linspace(0, len(part) - 1, min(N_PER_BAND, len(part))).astype(int)]
                groups.append(self._group(activity, chosen, *names, bounds))
        return groups

    def _group(
        self,
        activity: Activity,
        segments: Int[np.ndarray, " n"],
        name_it: str,
        name_en: str,
        bounds: tuple[float, float] | None,
    ) -> GroupRecord:
        lo, hi = bounds or (None, None)
        contexts = [self._context(activity, int(segment)) for segment in segments]
        return GroupRecord(name_it=name_it, name_en=name_en, lo=lo, hi=hi, contexts=contexts)

    def _context(self, activity: Activity, segment: int) -> ContextRecord:
        first = int(self.source.start[segment])
        last = first + int(self.source.length[segment])
        text, spans = self.cache.spans(first, last)
        values = self.source.values(activity, np.arange(first, last))
        document = self.cache.document(int(self.source.doc[segment]))
        return ContextRecord(
            doc_id=document.doc_id,
            source=document.source,
            max=float(values.max()),
            segments=split_text(text, spans, values),
        )


def short_name(manifest: Manifest) -> str:
    """Return the SAE's name as in Llama Scope: layer, site and expansion, e.g. `L14R-32x`."""
    hook = parse_hook_name(manifest.hook_name)
    expansion = manifest.d_sae / manifest.d_in
    return f"L{hook.layer}{hook.site or ''}-{expansion:g}x" if expansion >= 1 else f"L{hook.layer}{hook.site or ''}"


def _score(row: dict[str, Any]) -> ScoreRecord:
    keys = ("scorer", "judge", "negatives", "metric", "value", "lo", "hi", "explainer")
    return ScoreRecord(**{key: row[key] for key in keys}, n_pos=row["n_positive"], n_neg=row["n_negative"])


def split_text(text: str, spans: Int[np.ndarray, "tokens 2"], values: np.ndarray) -> list[tuple[str, float]]:
    """Return the text in pieces with the activation of each; the pieces joined are the text, character for character.

    Where tokens share characters (a letter of several bytes), the piece has the largest of their activations.
    """
    strength = np.zeros(len(text))
    cut = np.zeros(len(text) + 1, dtype=bool)
    for (start, end), value in zip(spans.tolist(), values.tolist(), strict=True):
        strength[start:end] = np.maximum(strength[start:end], value)
        cut[start] = cut[end] = True
    edges = [0, *np.flatnonzero(cut[1:-1]) + 1, len(text)]
    pieces: list[tuple[str, float]] = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        value = float(strength[start:end].max(initial=0.0))
        if pieces and value == 0.0 and pieces[-1][1] == 0.0:
            pieces[-1] = (pieces[-1][0] + text[start:end], 0.0)
        elif end > start:
            pieces.append((text[start:end], value))
    return pieces
