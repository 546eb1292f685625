"""One cache as the page sees it: `run()`, `rows()` and `card(latent)`, made on demand for every host alike."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sae_italian import __version__
from sae_italian.autointerp.now import made_now, with_now
from sae_italian.autointerp.run import EXPLAINER, LOOKUP, STORE_FILE
from sae_italian.autointerp.store import NOW, Explanation, Store
from sae_italian.autointerp.summary import HEADLINE
from sae_italian.autointerp.tokens import token_strings
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import read_json, utc_now
from sae_italian.browser.contexts import ContextMaker
from sae_italian.browser.decoder import Decoder
from sae_italian.browser.labels import labels_of
from sae_italian.browser.schema import (
    CardRecord,
    ExplanationRecord,
    GoldRecord,
    GroupRecord,
    MetricRecord,
    NeighbourRecord,
    RowRecord,
    RunRecord,
    ScoreRecord,
    SourceRecord,
)
from sae_italian.browser.table import records
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.models import parse_hook_name

T = TypeVar("T")
RESULTS = "results.json"
SHOWN_METRICS = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc")
N_SOURCES = 12  # of a latent's sources, those with most documents: a corpus may have thousands
LABEL_SHOWN = 0.5  # F1 from which a label is shown on a latent's row
_SCORE_FIELDS = ("scorer", "judge", "negatives", "metric", "value", "lo", "hi", "n_pos", "n_neg", "explainer")
_SCORES = f"""
    SELECT scorer, judge, negatives, metric, value, lo, hi, n_positive, n_negative, explainer
    FROM score JOIN explanation ON explanation.id = score.explanation_id
    WHERE score.latent = ? AND control = '' AND judge NOT LIKE 'always-%'
      AND scorer IN {tuple(HEADLINE)} AND metric IN {SHOWN_METRICS}
    ORDER BY explainer, scorer, judge, negatives, metric"""


class LatentSource:
    """The records of one cache and of what lies beside it. Safe to use from several threads.

    `store` defaults to `autointerp.sqlite` in the cache's folder and `results` to its `results.json`, where they are.
    With `sae` (and `model`) the map and the histogram of logits come too.
    """

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Any,
        *,
        store: Path | None = None,
        sae: Any = None,
        model: Any = None,
        title: str = "",
        model_note: str = "",
        n_top: int | None = None,
        per_tenth: int | None = None,
    ):
        self.cache, self.tokenizer = cache, tokenizer
        self.title = title or f"{cache.manifest.model} · {cache.manifest.hook_name}"
        self.model_note = model_note
        self.stats = cache.statistics
        self.strings = token_strings(tokenizer, len(tokenizer))
        self.decoder = None if sae is None else Decoder(sae, model)
        sizes = {"n_top": n_top, "per_tenth": per_tenth}
        self.contexts = ContextMaker(cache, **{name: size for name, size in sizes.items() if size is not None})
        self._read_results(cache.folder / RESULTS)
        self.store_path = store or cache.folder / STORE_FILE
        self._local = threading.local()
        self.refresh()

    def _read_results(self, file: Path) -> None:
        try:
            self.results: dict[str, Any] = read_json(file) if file.is_file() else {}
            self.metrics: list[MetricRecord] = records(self.results, "metrics")
            self.controls: list[MetricRecord] = records(self.results, "controls")
            self.gold: list[dict[str, Any]] = list(self.results.get("gold") or [])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{file} is no run's results ({error}). Remove it, or make the run again.") from error

    def version(self) -> tuple[Any, ...]:
        """Return what changes whenever something is stored: time and size of the store and of its write-ahead log."""
        found = []
        for ending in ("", "-wal"):
            try:
                facts = self.store_path.with_name(self.store_path.name + ending).stat()
                found.append((facts.st_mtime_ns, facts.st_size))
            except OSError:
                found.append(None)
        return tuple(found)

    def update(self) -> None:
        """Read again what is stored where something new is."""
        if self.version() != self._version:
            self.refresh()

    def refresh(self) -> None:
        """Read explanations, headline scores and labels again, after something new was stored."""
        self._version = self.version()
        self.explanations: dict[str, dict[int, Explanation]] = {}
        self.headline: dict[tuple[str, str], dict[int, float]] = {}
        self.intervals: dict[int, tuple[float | None, float | None]] = {}
        if store := self.store():
            stored = {n: {k: e for k, (_, e) in store.explanations(n).items()} for n in store.explainers()}
            ordered = sorted(with_now(stored).items(), key=lambda item: (item[0] != EXPLAINER, item[0] == LOOKUP))
            self.explanations = dict(ordered)
            for explainer in (EXPLAINER, LOOKUP):
                for scorer, negatives in HEADLINE.items():
                    test = {"control": "", "scorer": scorer, "metric": "balanced_accuracy", "negatives": negatives}
                    now = self._now(explainer, store.values(explainer=explainer + NOW, **test))
                    self.headline[explainer, scorer] = store.values(explainer=explainer, **test) | now
            now = self._now(EXPLAINER, _intervals(store, EXPLAINER + NOW))
            self.intervals = _intervals(store, EXPLAINER) | now
        self.labels = labels_of(self.store(), self.gold)

    def _now(self, explainer: str, values: dict[int, T]) -> dict[int, T]:
        """Return the values of the latents whose explanation was made on demand."""
        of = self.explanations.get(explainer, {})
        return {k: value for k, value in values.items() if k in of and of[k].explainer.endswith(NOW)}

    def store(self) -> Store | None:
        """Return this thread's connection to the store, None without a store. One that cannot be written is read."""
        if not hasattr(self._local, "store") and self.store_path.is_file():
            try:
                self._local.store = Store(self.store_path, {})
            except UsageError:
                self._local.store = Store(self.store_path, {}, read_only=True)
        return getattr(self._local, "store", None)

    @property
    def d_sae(self) -> int:
        return self.cache.manifest.d_sae

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> RunRecord:
        manifest = self.cache.manifest
        keys = ("label", "category", "n", "latent", "f1", "precision", "recall")
        return RunRecord(
            title=self.title,
            created=utc_now(),
            version=__version__,
            model=manifest.model,
            model_note=self.model_note,
            sae=short_name(manifest),
            hook_name=manifest.hook_name,
            d_in=manifest.d_in,
            d_sae=manifest.d_sae,
            k=manifest.k,
            corpus=manifest.corpus,
            n_tokens=self.cache.n_positions,
            context_size=manifest.context_size,
            n_documents=self.cache.n_documents,
            metrics=self.metrics,
            controls=self.controls,
            gold=[GoldRecord(**{key: result[key] for key in keys}) for result in self.gold],
        )

    # --- the list ----------------------------------------------------------------------------------------------------

    def rows(self) -> dict[str, list[Any]]:
        """Return the list of all latents by column; the columns are the fields of `RowRecord`."""
        return columns(self.row(latent) for latent in range(self.d_sae))

    def row(self, latent: int) -> RowRecord:
        """Return one latent's row of the list. Raises: UsageError when there is no such latent."""
        self.cache.range_of(latent)
        explanation = self.explanations.get(EXPLAINER, {}).get(latent)
        llm = next(iter(self._llm(latent)), None)
        own = self.headline.get((EXPLAINER, "detection"), {}).get(latent)
        lookup = self.headline.get((LOOKUP, "detection"), {}).get(latent)
        lo, hi = self.intervals.get(latent, (None, None))
        count = int(self.stats["count"][latent])
        status = explanation.status if explanation else "not explained"
        x, y = (None, None) if self._plane is None else (round(float(value), 4) for value in self._plane[latent])
        return RowRecord(
            latent=latent,
            density=float(self.stats["density"][latent]),
            max=float(self.stats["max"][latent]),
            n_active=count,
            explanation_it=explanation.text_it if explanation else "",
            explanation_en=explanation.text_en if explanation else "",
            llm_it=llm.text_it if llm else "",
            llm_en=llm.text_en if llm else "",
            kind=explanation.rule["family"] if explanation and explanation.rule else "",
            detection=own,
            detection_lo=lo,
            detection_hi=hi,
            fuzzing=self.headline.get((EXPLAINER, "fuzzing"), {}).get(latent),
            gain=None if own is None or lookup is None else own - lookup,
            top_tokens=[self.strings[i] for i in self.stats["token_ids"][latent][:5]],
            gold=[label["label"] for label in self.labels.get(latent, []) if (label["f1"] or 0) >= LABEL_SHOWN],
            dead=count == 0,
            x=x,
            y=y,
            status="" if status == "ok" else status,
        )

    @cached_property
    def _plane(self) -> np.ndarray | None:
        return None if self.decoder is None else self.decoder.plane()

    def _llm(self, latent: int) -> Iterator[Explanation]:
        """Yield the explanations that are neither the rule nor the control and have a text."""
        for name, by_latent in self.explanations.items():
            found = by_latent.get(latent)
            if name not in (EXPLAINER, LOOKUP) and found is not None and (found.text_it or found.text_en):
                yield found

    # --- the card ----------------------------------------------------------------------------------------------------

    def cards(self, latents: Iterable[int] | None = None) -> Iterator[CardRecord]:
        for latent in range(self.d_sae) if latents is None else latents:
            yield self.card(latent)

    def card(self, latent: int) -> CardRecord:
        """Return everything about one latent. Raises: UsageError when there is no such latent."""
        stats, activations = self.stats, self.cache.latent(latent)
        largest = float(stats["max"][latent])
        counts = stats["histogram"][latent].tolist() if largest else []
        rule = self.explanations.get(EXPLAINER, {}).get(latent)
        sources, more_sources = self._sources(activations.position)
        return CardRecord(
            latent=latent,
            explanations=self._explanations(latent),
            scores=self._scores(latent),
            histogram={"edges": np.linspace(0, largest, len(counts) + 1).tolist() if counts else [], "counts": counts},
            logits=self.decoder.logits(latent) if self.decoder else {"edges": [], "counts": []},
            positions=stats["position_profile"][latent].tolist() if largest else [],
            promoted=self._tokens(latent, "promoted"),
            suppressed=self._tokens(latent, "suppressed"),
            decoder=self._neighbours(latent, "decoder_ids", "decoder_cosines"),
            cofiring=self._neighbours(latent, "cofiring_ids", "cofiring_jaccard"),
            groups=self.contexts.groups(activations),
            tokens=[
                {"token": self.strings[token], "share": float(share)}
                for token, share in zip(stats["token_ids"][latent], stats["token_shares"][latent], strict=True)
            ],
            sources=sources,
            more_sources=more_sources,
            labels=self.labels.get(latent, []),
            rule=_shown_rule(rule.rule if rule else None),
        )

    def wide(self, latent: int) -> list[GroupRecord]:
        """Return the card's passages, each with all that its window holds of its document."""
        self.cache.range_of(latent)
        size = self.cache.manifest.context_size
        return self.contexts.groups(self.cache.latent(latent), size, size)

    def _explanations(self, latent: int) -> list[ExplanationRecord]:
        return [
            ExplanationRecord(
                explainer=name, kind=e.kind, status=e.status, text_it=e.text_it, text_en=e.text_en, now=made_now(e)
            )
            for name, by_latent in self.explanations.items()
            if (e := by_latent.get(latent)) is not None
        ]

    def _scores(self, latent: int) -> list[ScoreRecord]:
        """Return the scores of the latent's own explanations, detection and fuzzing, by every judge."""
        store = self.store()
        rows = store.connection.execute(_SCORES, (latent,)) if store else ()
        found = [ScoreRecord(**dict(zip(_SCORE_FIELDS, row, strict=True))) for row in rows]
        names = {e.explainer: name for name, of in self.explanations.items() if (e := of.get(latent)) is not None}
        return [{**score, "explainer": names[score["explainer"]]} for score in found if score["explainer"] in names]

    def _tokens(self, latent: int, which: str) -> list[Any]:
        ids, values = self.stats[f"{which}_ids"][latent], self.stats[f"{which}_values"][latent]
        return [{"token": self.strings[i], "value": float(value)} for i, value in zip(ids, values, strict=True)]

    def _neighbours(self, latent: int, ids: str, values: str) -> list[NeighbourRecord]:
        pairs = zip(self.stats[ids][latent].tolist(), self.stats[values][latent].tolist(), strict=True)
        return [NeighbourRecord(latent=other, value=value) for other, value in pairs]

    @cached_property
    def _source_of(self) -> tuple[list[str], np.ndarray]:
        """The names of the corpus' sources, and which one each document is of."""
        names: dict[str, int] = {}
        number = [names.setdefault(name, len(names)) for name in _sources(self.cache)]
        return list(names), np.array(number, dtype=np.int32)

    def _sources(self, position: np.ndarray) -> tuple[list[SourceRecord], int]:
        """Return the sources of some positions (in order), most documents first, and how many more there are."""
        names, number = self._source_of
        doc = self.cache.gather("doc", position)
        doc = doc[doc < len(number)]
        tokens = np.bincount(number[doc], minlength=len(names))
        documents = np.bincount(number[np.unique(doc[np.diff(doc, prepend=-1) != 0])], minlength=len(names))
        found = np.flatnonzero(documents)
        shown = found[np.argsort(-documents[found], kind="stable")][:N_SOURCES].tolist()
        records = [SourceRecord(source=names[i], documents=int(documents[i]), tokens=int(tokens[i])) for i in shown]
        return records, len(found) - len(shown)


def columns(rows: Iterable[RowRecord]) -> dict[str, list[Any]]:
    """Return rows by column."""
    found: dict[str, list[Any]] = {name: [] for name in RowRecord.__annotations__ if not name.startswith("__")}
    for row in rows:
        for name, values in found.items():
            values.append(row[name])
    return found


def _sources(cache: FeatureCache) -> Iterator[str]:
    """Yield the source of every document, without its text."""
    for shard in cache.manifest.shards:
        arrays = cache.shard_tokens(shard.index)
        data, pointers = arrays["source"].tobytes(), arrays["source_ptr"].tolist()
        for begin, end in zip(pointers[:-1], pointers[1:], strict=True):
            yield data[begin:end].decode("utf-8", "replace")


def short_name(manifest: Manifest) -> str:
    """Return the SAE's name as in Llama Scope: layer, site and expansion, e.g. `L14R-32x`."""
    hook = parse_hook_name(manifest.hook_name)
    expansion = manifest.d_sae / manifest.d_in
    return f"L{hook.layer}{hook.site or ''}-{expansion:g}x" if expansion >= 1 else f"L{hook.layer}{hook.site or ''}"


def _shown_rule(rule: dict[str, Any] | None, shown: int = 20) -> dict[str, Any] | None:
    """Return a rule for a reader: tokens instead of ids, the heaviest only."""
    if rule is None:
        return None
    numbers = {name: round(rule[name], 4) for name in ("threshold", "precision", "recall")}
    return {"family": rule["family"], **numbers, "keys": rule["shown"][:shown]}


def _intervals(store: Store, explainer: str) -> dict[int, tuple[float | None, float | None]]:
    """Return the interval of an explainer's headline detection by latent."""
    query = """SELECT score.latent, lo, hi FROM score JOIN explanation ON explanation.id = score.explanation_id
               WHERE explainer = ? AND control = '' AND scorer = 'detection' AND metric = 'balanced_accuracy'
                 AND judge = 'rule' AND negatives = ?"""
    rows = store.connection.execute(query, (explainer, HEADLINE["detection"]))
    return {latent: (lo, hi) for latent, lo, hi in rows}
