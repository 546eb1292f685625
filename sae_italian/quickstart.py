"""The whole way in one call: train an SAE, cache its latents, explain and score them with controls, write the report."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sae_italian
from sae_italian.analysis import gold_table
from sae_italian.analysis.labels import DETECTED
from sae_italian.autointerp import AutointerpConfig, random_sae_control, run_autointerp, summarise
from sae_italian.autointerp.run import STORE_FILE, TWIN_FOLDER
from sae_italian.autointerp.store import Store, forget
from sae_italian.base.labels import label
from sae_italian.base.report import plain
from sae_italian.base.statistics import Estimate, reaches
from sae_italian.base.storage import claimed, locked, read_json, remove, write_json, write_text
from sae_italian.base.units import PROCESSORS
from sae_italian.browser import LatentSource, write_browser
from sae_italian.browser.page import records, text_table
from sae_italian.browser.source import RESULTS

CARD_TOKENS = 50_000


def quickstart(
    out: str | Path = "quickstart",
    config: str = "mini/topk",
    *overrides: str,
    cache_tokens: int = 300_000,
    card_tokens: int = CARD_TOKENS,
    latents: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run every step into `out` (sae/, cache/, report/) and return the results, also written to `out/results.json`.

    The cache is built on held-out text, so nothing that is explained or scored was trained on. The random twin's cache,
    as large as the SAE's own, goes once its numbers are read. A run that was stopped continues with `resume=True`.
    Raises: UsageError as the steps do.
    """
    out = Path(out)
    spec = sae_italian.load_spec(config, *overrides)
    settings = {"cache_tokens": cache_tokens, "card_tokens": card_tokens, "latents": latents}
    with claimed(out, "quickstart", {**spec.model_dump(), **settings}, resume=resume, overwrite=overwrite):
        sae_folder = sae_italian.train(spec, out / "sae", resume=(out / "sae").is_dir())
        model = sae_italian.load_model(spec.model, device=spec.device)
        sae = sae_italian.load_sae(sae_folder, device=spec.device)
        text = {"n_tokens": cache_tokens, "split": "heldout", "text_column": spec.text_column}
        kept = {"sae_name": str(sae_folder.resolve()), "resume": (out / "cache").is_dir()}
        sae_italian.build_cache(sae, model, spec.corpus, out / "cache", **text, **kept)
        cache = sae_italian.FeatureCache.open(out / "cache", sae=sae, tokenizer=model.tokenizer)
        asked: dict[str, Any] = {"config": AutointerpConfig(latents=latents), "workers": PROCESSORS}
        results = analyse(cache, sae, model, card_tokens=card_tokens, **asked)
        remove(cache.folder / TWIN_FOLDER)
        with Store(cache.folder / STORE_FILE, {}) as store:
            store.connection.execute("VACUUM")
        report = write_browser(out / "report", LatentSource(cache, model.tokenizer, sae=sae, model=model))
        results["report"] = str(report)
        write_json(out / "results.json", results)
        write_text(out / "results.md", table_of(results) + "\n")
    return results


def analyse(
    cache: Any,
    sae: Any,
    model: Any,
    *,
    card_tokens: int | None = CARD_TOKENS,
    config: Any = None,
    random_control: bool = True,
    workers: int = 1,
    run_units: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Measure, explain and score what a cache holds; return the results, also kept in the cache's folder.

    Parts: `card` (unless `card_tokens` is None), `autointerp`, `random` (unless turned off), `gold`. The random twin's
    numbers are measured once for a configuration: its cache may be removed.
    """
    manifest = cache.manifest
    file = cache.folder / RESULTS
    results: dict[str, Any] = read_json(file) if file.is_file() else {}
    if card_tokens is not None and (results.get("card") or {}).get("n_tokens_asked") != card_tokens:
        text = {"context_size": manifest.context_size, "text_column": manifest.text_column}
        card = sae_italian.evaluate(sae, model, manifest.corpus, n_tokens=card_tokens, name=manifest.sae, **text)
        if Path(manifest.sae).is_dir():
            card.save(Path(manifest.sae))
        results["card"] = {**plain(card), "n_tokens_asked": card_tokens}
    config = config or AutointerpConfig()
    store = run_autointerp(cache, model.tokenizer, config, sae=sae, workers=workers, run_units=run_units)
    results |= {"autointerp": summarise(store).as_dict(), "gold": [asdict(result) for result in gold_table(cache)]}
    if random_control and results.get("random_of") != asdict(config):
        twin = random_sae_control(cache, sae, model, config, workers=workers)
        gold = gold_table(sae_italian.FeatureCache.open(twin.parent))
        results |= {"random": summarise(twin).as_dict(), "random_gold": [asdict(result) for result in gold]}
        results["random_of"] = asdict(config)
    write_json(file, results)
    return results


def forget_scores(cache: Any) -> None:
    """Drop the explanations and scores of a cache, those of its random twin too; activations and paid calls stay."""
    with locked(cache.folder):
        for folder in (cache.folder, cache.folder / TWIN_FOLDER):
            forget(folder / STORE_FILE)
    if (cache.folder / RESULTS).is_file():
        kept = {key: part for key, part in read_json(cache.folder / RESULTS).items() if not key.startswith("random")}
        write_json(cache.folder / RESULTS, kept)


# Rows that follow the short list of metrics: the part of the results, and the label, which ends with the number's name.
_ROWS = (
    *(("autointerp", f"metrics.{name}") for name in ("simulation", "simulation_random")),
    *(("autointerp", f"controls.{name}") for name in ("shuffled_fuzzing", "shuffled_simulation")),
    *(("autointerp", f"controls.{name}") for name in ("lookup_detection", "lookup_fuzzing")),
    *(("autointerp", key) for key in ("controls.title_detection", "metrics.only_token")),
    *(("random", f"controls.random_{name}") for name in ("fuzzing", "lookup_detection")),
    *(("autointerp", f"controls.{name}") for name in ("always_yes", "always_no")),
)


def table_of(results: dict[str, Any]) -> str:
    """Return the short table of a run as Markdown: the metrics and controls, then what each number rests on."""
    auto, rows = results.get("autointerp") or {}, []
    for scorer, by_source in (auto.get("by_negatives") or {}).items():
        head = f"{label(f'scorer.{scorer}')}, negatives: "
        rows += [(head + label(f"negatives.{source}"), *_number(found)) for source, found in by_source.items()]
    for part, key in _ROWS:
        name = key.partition(".")[2].removeprefix("random_" if part == "random" else "")
        rows.append((label(key), *_number((results.get(part) or {}).get(name))))
    deciles = [tenth["value"] for tenth in auto.get("by_decile") or [] if tenth["value"] is not None]
    rows.append((label("metrics.by_decile"), " ".join(f"{value:.2f}" for value in deciles), ""))
    if auto and not auto.get("enough", True):
        rows.append(("Latents drawn", f"{auto['n_latents']}: fewer than 300 do not stand for the SAE", ""))
    if not auto.get("by_document", True):
        rows.append(("Intervals of means", "some are not in this older store: autointerp CACHE --overwrite", ""))
    for part in ("gold", "random_gold"):
        gold = results.get(part) or []
        detected = f"{sum(reaches(row['f1'], DETECTED) for row in gold)} of {len(gold)}"
        rows.append((f"{label(f'metrics.{part}')} ≥ {DETECTED}", detected if gold else "", ""))
    shown = [row for row in rows if row[1]]
    return text_table(records(results, "metrics") + records(results, "controls"), shown)


def _number(estimate: dict[str, float | None] | None) -> tuple[str, str]:
    """Return a number and its interval, each empty where it was not measured."""
    ends = ((estimate or {}).get(name) for name in Estimate._fields)
    value, lo, hi = ("" if end is None else f"{end:.3f}" for end in ends)
    return value, f"{lo} to {hi}" if lo else ""
