"""One cache as the page sees it: `run()`, `rows()` and `card(latent)`, made on demand for every host alike."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian import __version__
from sae_italian.autointerp.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.places import piece_texts
from sae_italian.autointerp.run import STORE_FILE
from sae_italian.autointerp.scorers.binary import HEADLINE
from sae_italian.autointerp.store import NOW, Explanation, Store
from sae_italian.autointerp.work import TITLE, WHOLE, made_now, with_now
from sae_italian.base.errors import DataError, SaeItalianError, UsageError
from sae_italian.base.report import plain
from sae_italian.base.storage import read_json, utc_now
from sae_italian.browser.contexts import file_name, passages_of, samples
from sae_italian.browser.directions import Decoder
from sae_italian.browser.page import COLUMNS, LABEL_SHOWN, Record, records
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.cache.layout import MANIFEST
from sae_italian.corpora.stream import mixture
from sae_italian.evaluation.card import read_card, read_seeds
from sae_italian.models import parse_hook_name, resolved_here
from sae_italian.saes import load_sae, weights_hash
from sae_italian.saes.foreign import SAELENS_WEIGHTS

RESULTS = "results.json"
SHOWN_METRICS = ("balanced_accuracy", "tpr", "tnr", "f1", "auroc")
AT_ONCE = 512  # latents whose strongest passages are looked up together
N_SOURCES = 12  # of a latent's sources, those with most documents: a corpus may have thousands
N_LABELS, N_KEYS = 10, 20  # labels of a latent, best first; keys of its rule, heaviest first
SCORE_FIELDS = ("scorer", "judge", "negatives", "metric", "value", "lo", "hi", "n_pos", "n_neg", "explainer")
GOLD_FIELDS = ("label", "category", "n", "latent", "f1", "precision", "recall")
NOT_EXPLAINED = Explanation(-1, "", "not explained", "", "", None)
LABEL_FIELDS = ("label", "source", "f1", "lo", "hi", "precision", "recall", "n")
_SCORES = f"""
    SELECT scorer, judge, negatives, metric, value, lo, hi, n_positive, n_negative, explainer
    FROM score JOIN explanation ON explanation.id = score.explanation_id
    WHERE score.latent = ? AND control = '' AND judge NOT LIKE 'always-%'
      AND scorer IN {tuple(HEADLINE)} AND metric IN {SHOWN_METRICS}
    ORDER BY explainer, scorer, judge, negatives, metric"""
_HEADLINE = f"""
    SELECT explainer, iif(control = '', scorer, control), score.latent, value, lo, hi
    FROM score JOIN explanation ON explanation.id = score.explanation_id
    WHERE (control = '' OR control IN {TITLE, WHOLE} AND scorer = 'detection') AND judge = 'rule'
      AND metric = 'balanced_accuracy' AND value IS NOT NULL
      AND (scorer, negatives) IN (VALUES {", ".join(map(str, HEADLINE.items()))})"""


class LatentSource:
    """The records of one cache and of what lies beside it: its store and its results. Safe to use from several threads.

    With `sae` (and `model`) the map and the histogram of logits come too (opening.py finds them).
    """

    def __init__(self, cache: FeatureCache, tokenizer: Any, *, sae: Any = None, model: Any = None):
        if cache.manifest.tokenizer_hash:  # none in a cache imported without text
            cache.check_tokenizer(tokenizer)
        self.cache, self.tokenizer, self.stats = cache, tokenizer, cache.statistics
        self.store_path = cache.folder / STORE_FILE
        self.strings = piece_texts(tokenizer, len(tokenizer))
        self.decoder = None if sae is None else Decoder(sae, model)
        self.model: Any = None if sae is None else model
        self._document = lru_cache(8192)(cache.document)
        self._samples: dict[int, str] = {}
        there = Path(cache.manifest.sae)
        with suppress(SaeItalianError, OSError):  # one that cannot be read may be the cache's
            younger = (there / SAELENS_WEIGHTS).stat().st_mtime > (cache.folder / MANIFEST).stat().st_mtime
            if sae is None and younger and weights_hash(load_sae(there)) != cache.manifest.sae_hash:
                there = cache.folder  # another was trained there since: its card is not shown
        self.seeds = read_seeds(there) or {}
        self._sae_folder = there
        self.graphs: dict[int, list[Record]] = {}  # by latent, those that a page beside them links to
        self._local, self._version = threading.local(), None
        self.refresh()

    def _read_results(self, file: Path) -> None:
        try:
            results = read_json(file) if file.is_file() else {}
            if "card" not in results:  # `evaluate` leaves it with the SAE; an older version's is not shown
                with suppress(DataError):
                    results["card"] = plain(read_card(self._sae_folder))
            self.metrics: list[Record] = records(results, "metrics")
            self.controls: list[Record] = records(results, "controls")
            self.gold: list[dict[str, Any]] = list(results.get("gold") or [])
            labels_of(None, self.gold)  # what it holds can be shown
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise DataError(f"{file} is no run's results ({error}). Remove it, or make the run again.") from error

    # --- what is stored beside the cache -----------------------------------------------------------------------------

    def version(self) -> tuple[Any, ...]:
        """Return what changes whenever something is stored: time and size of the store, of its log, of the results."""
        files = (self.cache.folder / name for name in (STORE_FILE, f"{STORE_FILE}-wal", RESULTS))
        facts = (file.stat() for file in files if file.exists())
        return tuple((fact.st_mtime_ns, fact.st_size) for fact in facts)

    def refresh(self) -> None:
        """Read results, explanations, headline scores and labels again where something new was stored."""
        if (now := self.version()) == self._version:
            return
        self._read_results(self.cache.folder / RESULTS)
        self._version, store = now, self.store()
        self.explanations: dict[str, dict[int, Explanation]] = {}  # by explainer: the rules first, the control last
        self.scores: dict[tuple[str, str], dict[int, list[float | None]]] = {}  # value, lo, hi
        if store:
            stored = {name: store.explanations(name) for name in store.explainers()}
            stored, order = with_now(stored), (lambda name: (name != EXPLAINER, name == LOOKUP))
            self.explanations = {name: stored[name] for name in sorted(stored, key=order)}
            for explainer, scorer, latent, *score in store.connection.execute(_HEADLINE):
                name = explainer.removesuffix(NOW)
                if self.explained(name, latent).explainer == explainer:  # `@now` only where a run left room
                    self.scores.setdefault((name, scorer), {})[latent] = score
        self.labels = labels_of(store, self.gold)

    def store(self) -> Store | None:
        """Return this thread's connection to the store, None without a store. One that cannot be written is read."""
        if not hasattr(self._local, "store") and self.store_path.is_file():
            try:
                self._local.store = Store(self.store_path, {})
            except UsageError:
                self._local.store = Store(self.store_path, {}, read_only=True)
        return getattr(self._local, "store", None)

    # --- the run and the list ----------------------------------------------------------------------------------------

    @property
    def d_sae(self) -> int:
        return self.cache.manifest.d_sae

    def run(self) -> Record:
        manifest = self.cache.manifest
        own, model = ("hook_name", "d_in", "d_sae", "k", "context_size", "sae_hash"), resolved_here(manifest.model)
        entry = model and model.entry
        return {
            **{name: getattr(manifest, name) for name in own},
            "model": public_name(manifest.model),
            "corpus": public_name(manifest.corpus),
            "title": f"{public_name(manifest.model)} · {manifest.hook_name}",
            "created": utc_now(),
            "version": __version__,
            "model_note": f"{entry.note} {entry.licence}." if entry else "",
            "model_note_it": f"{entry.note_it} {entry.licence}." if entry else "",
            "sae": short_name(manifest),
            "n_tokens": self.cache.n_positions,
            "n_documents": self.cache.documents_read,
            "metrics": self.metrics,
            "controls": self.controls,
            "gold": [{name: result[name] for name in GOLD_FIELDS} for result in self.gold],
        }

    def rows(self) -> dict[str, list[Any]]:
        """Return the list of all latents by column (page.py)."""
        latents = range(self.d_sae)
        for start in range(len(self._samples), self.d_sae, AT_ONCE):
            some = latents[start : start + AT_ONCE]
            self._samples.update(zip(some, samples(self.cache, self._document, some), strict=True))
        return {name: [column.value(self, latent) for latent in latents] for name, column in COLUMNS.items()}

    def row(self, latent: int) -> Record:
        """Return one latent's row of the list. Raises: UsageError when there is no such latent."""
        self.cache.range_of(latent)
        return {name: column.value(self, latent) for name, column in COLUMNS.items()}

    def sample(self, latent: int) -> str:
        """Return the latent's strongest passage in one line (contexts.py)."""
        return self._samples.get(latent) or samples(self.cache, self._document, [latent])[0]

    def explained(self, explainer: str, latent: int) -> Explanation:
        """Return the explanation of an explainer, an empty one where there is none."""
        return self.explanations.get(explainer, {}).get(latent, NOT_EXPLAINED)

    def llm_explanation(self, latent: int) -> Explanation | None:
        """Return the first explanation with a text that is neither the rule nor the control."""
        found = (of.get(latent) for name, of in self.explanations.items() if name not in (EXPLAINER, LOOKUP))
        return next((e for e in found if e and (e.text_it or e.text_en)), None)

    def score(self, explainer: str, scorer: str, latent: int, end: str = "value") -> float | None:
        """Return a headline score, 0 to 1, or an end of its 95 % interval (`lo`, `hi`); None where not measured."""
        found = self.scores.get((explainer, scorer), {}).get(latent)
        return None if found is None else found[("value", "lo", "hi").index(end)]

    def place(self, latent: int, axis: int) -> float | None:
        """Return where the latent is on the map, -1 to 1; None without the decoder."""
        return None if self.decoder is None else round(float(self.decoder.plane[latent, axis]), 4)

    # --- the card ----------------------------------------------------------------------------------------------------

    def card(self, latent: int) -> Record:
        """Return everything about one latent. Raises: UsageError when there is no such latent."""
        stats, activations = self.stats, self.cache.latent(latent)
        largest = float(stats["max"][latent])
        counts = stats["histogram"][latent].tolist() if largest else []
        edges = np.linspace(0, largest, len(counts) + 1).tolist() if counts else []
        sources, more_sources = self._sources(activations.position)
        return {
            "latent": latent,
            "explanations": self._explanations(latent),
            "scores": self._scores(latent),
            "histogram": {"edges": edges, "counts": counts},
            "logits": self.decoder.histogram(latent) if self.decoder else {"edges": [], "counts": []},
            "positions": stats["position_profile"][latent].tolist() if largest else [],
            "promoted": self._tokens(latent, "promoted_ids", "promoted_values"),
            "suppressed": self._tokens(latent, "suppressed_ids", "suppressed_values"),
            "decoder": self._neighbours(latent, "decoder_ids", "decoder_cosines"),
            "cofiring": self._neighbours(latent, "cofiring_ids", "cofiring_jaccard"),
            "groups": passages_of(activations, self._document),
            "tokens": self._tokens(latent, "token_ids", "token_shares", "share"),
            "sources": sources,
            "more_sources": more_sources,
            "labels": self.labels.get(latent, []),
            "rule": _shown_rule(self.explained(EXPLAINER, latent).rule),
            "seeds": self._seeds_of(latent),
            "graphs": self.graphs.get(latent, []),
        }

    def _seeds_of(self, latent: int) -> Record | None:
        """Return in how many of the training's seeds the latent was found; None where there was one, or it is dead."""
        found = self.seeds["found"][latent] if self.seeds else None
        return None if found is None else {"found": found, "of": len(self.seeds["seeds"])}

    def _explanations(self, latent: int) -> list[Record]:
        found = ((name, of[latent]) for name, of in self.explanations.items() if latent in of)
        return [{**told(e), "explainer": name, "now": made_now(e)} for name, e in found]

    def wide(self, latent: int) -> list[Record]:
        """Return the card's passages, each with all that its window holds of its document."""
        self.cache.range_of(latent)
        size = self.cache.manifest.context_size
        return passages_of(self.cache.latent(latent), self._document, size, size, 0)

    def _scores(self, latent: int) -> list[Record]:
        """Return the scores of the latent's own explanations, detection and fuzzing, by every judge."""
        store = self.store()
        rows = store.connection.execute(_SCORES, (latent,)) if store else ()
        names = {of[latent].explainer: name for name, of in self.explanations.items() if latent in of}
        return [dict(zip(SCORE_FIELDS, (*row, names[of]), strict=True)) for *row, of in rows if of in names]

    def _pairs(self, latent: int, ids: str, values: str) -> Iterator[tuple[int, float]]:
        return zip(self.stats[ids][latent].tolist(), self.stats[values][latent].tolist(), strict=True)

    def _tokens(self, latent: int, ids: str, values: str, name: str = "value") -> list[Record]:
        return [{"token": self.strings[token], name: value} for token, value in self._pairs(latent, ids, values)]

    def _neighbours(self, latent: int, ids: str, values: str) -> list[Record]:
        return [{"latent": other, "value": value} for other, value in self._pairs(latent, ids, values)]

    @cached_property
    def _source_of(self) -> tuple[list[str], np.ndarray]:
        """The names of the corpus' sources, and which one each document is of; texts are not read."""
        names: dict[str, int] = {}
        number: list[int] = []
        for shard in self.cache.manifest.shards:
            arrays = self.cache.shard_tokens(shard.index)
            data, pointers = arrays["source"].tobytes(), arrays["source_ptr"].tolist()
            texts = (data[begin:end].decode("utf-8", "replace") for begin, end in pairwise(pointers))
            number += [names.setdefault(file_name(name), len(names)) for name in texts]
        return list(names), np.array(number, dtype=np.int32)

    def _sources(self, position: np.ndarray) -> tuple[list[Record], int]:
        """Return the sources of some positions (in order), most documents first, and how many more there are."""
        names, number = self._source_of
        doc = self.cache.gather("doc", position)
        doc = doc[doc < len(number)]
        tokens = np.bincount(number[doc])
        found, documents = np.unique(number[np.unique(doc[np.diff(doc, prepend=-1) != 0])], return_counts=True)
        order = np.argsort(-documents, kind="stable")[:N_SOURCES]
        counts = zip(found[order].tolist(), documents[order].tolist(), strict=True)
        rows = [{"source": names[i], "documents": n, "tokens": int(tokens[i])} for i, n in counts]
        return rows, len(found) - len(rows)


def told(explanation: Explanation) -> Record:
    """Return what every page says of an explanation, in both languages."""
    own = {name: getattr(explanation, name) for name in ("explainer", "kind", "status", "text_it", "text_en")}
    return {**own, "title_it": explanation.title("it"), "title_en": explanation.title("en")}


def public_name(name: str) -> str:
    """Return a name that can be published: of paths on this machine, alone or mixed, the last parts, others as they are."""
    return ", ".join(Path(n).name if Path(n).is_absolute() or Path(n).exists() else n for n in mixture(name)[0])


def short_name(manifest: Manifest) -> str:
    """Return the SAE's name as in Llama Scope: layer, site and expansion, e.g. `L14R-32x`."""
    hook = parse_hook_name(manifest.hook_name)
    expansion = manifest.d_sae / manifest.d_in
    return f"L{hook.layer}{hook.site or ''}" + (f"-{expansion:g}x" if expansion >= 1 else "")


def labels_of(store: Store | None, gold: list[Record]) -> dict[int, list[Record]]:
    """Return the gold and UD labels that each latent detects, best first: the store's and those of the run's results.

    Where a label fails on other words, another language's perhaps, that follows the row in which it holds.
    """
    rows = [row._asdict() for row in store.labels()] if store else []
    rows += [{**row, "source": "gold"} for row in gold if row["f1"] >= LABEL_SHOWN]
    found: dict[int, list[Record]] = {}
    for row in sorted(rows, key=lambda row: -row["f1"]):
        found.setdefault(row["latent"], []).append({name: row.get(name) for name in LABEL_FIELDS})
    for latent, labels in found.items():
        first = {row["label"]: i for i, row in reversed([*enumerate(labels)])}
        found[latent] = sorted(labels, key=lambda row: first[row["label"]])[:N_LABELS]
    return found


def _shown_rule(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a rule for a reader: tokens instead of ids, the heaviest only."""
    if rule is None:
        return None
    numbers = {name: round(rule[name], 4) for name in ("threshold", "precision", "recall")}
    return {"family": rule["family"], **numbers, "keys": rule["shown"][:N_KEYS]}
