"""The browser against SAEDashboard in CPU seconds per latent, its bytes, its memory, and how fast it is in Chromium.

Both sides get the same model, SAE and windows, and make the same number of passages per latent, histograms and logits.
Ours is counted from the text on: building the cache, its statistics and the folder on disk. SAEDashboard's is counted
twice, to its data in memory and to its HTML on disk. It runs its ReLU way: SaeVisRunner refuses TopK SAEs (`fold_W_dec_norm`), so
both get the SAE's weights with one threshold that keeps as many latents on as TopK did.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.report import table
from sae_italian.browser.contexts import N_TOP, PER_TENTH, TENTHS
from sae_italian.browser.source import LatentSource
from sae_italian.browser.write import CARDS_PER_SHARD, MARKER, data_script, write_browser
from sae_italian.cache import FeatureCache, build_cache
from tests.browser.data_files import read_data


def measure_export(
    sae: Any, model: Any, corpus: str, *, n_tokens: int, dashboard: Path | None, latents: int
) -> dict[str, Any]:
    """Return CPU seconds per latent of both sides, and the bytes per latent of our folder.

    `dashboard` is the folder of SAEDashboard's packages (pip install --no-deps --target); None leaves that side out.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sae = _with_threshold(sae, model, corpus, n_tokens)
        sae.save_model(str(folder / "sae"))
        torch.set_num_threads(1)
        started = time.process_time()
        build_cache(sae, model, corpus, folder / "cache", n_tokens=n_tokens, sae_name=str(folder / "sae"))
        built = time.process_time()
        cache = FeatureCache.open(folder / "cache")
        write_browser(folder / "out", LatentSource(cache, model.tokenizer, sae=sae, model=model))
        written = time.process_time()
        d_sae = cache.manifest.d_sae
        result: dict[str, Any] = {
            "tokens": cache.n_positions,
            "d_sae": d_sae,
            "l0": cache.manifest.nnz / cache.n_positions,
            "cache_cpu_seconds_per_latent": (built - started) / d_sae,
            "export_cpu_seconds_per_latent": (written - built) / d_sae,
            **measure_bytes(folder / "out"),
        }
        if dashboard is not None:
            np.save(folder / "tokens.npy", cache.tokens.reshape(-1, cache.manifest.context_size))
            theirs = result["dashboard"] = _dashboard(folder, cache.manifest.model, dashboard, latents)
            data, html = (theirs[name] / theirs["latents"] for name in ("cpu_seconds", "html_cpu_seconds"))
            export = result["export_cpu_seconds_per_latent"]
            ours = result["cache_cpu_seconds_per_latent"] + export
            result["ratio"] = (data + html) / ours
            result["ratios"] = {
                "text to folder, their HTML": result["ratio"],
                "text to folder, their data alone": data / ours,
                "our export alone, their data alone": data / export,
            }
        return result


def _with_threshold(sae: Any, model: Any, corpus: str, n_tokens: int) -> Any:
    """Return the SAE's weights as a JumpReLU SAE whose one threshold leaves on as many latents as k, on some of the text."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    from sae_italian.corpora import iter_documents, pack
    from sae_italian.models.activations import read_activations

    k = getattr(sae.cfg, "k", None)
    if k is None:
        return sae
    context_size = sae.cfg.metadata.context_size or 128
    block = next(iter(pack(iter_documents(corpus), model.tokenizer, context_size, windows_per_block=32)))
    x = read_activations(model, torch.from_numpy(block.tokens), sae.cfg.metadata.hook_name)[:, 1:].flatten(0, 1)
    with torch.no_grad():
        hidden = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        threshold = float(torch.topk(hidden.flatten(), k * len(hidden)).values[-1])
        config = JumpReLUSAEConfig(
            d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, apply_b_dec_to_input=True, metadata=sae.cfg.metadata
        )
        other = JumpReLUSAE(config)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(other, name).copy_(getattr(sae, name))
        other.threshold.fill_(threshold)
    return other.eval()


def _dashboard(folder: Path, model: str, packages: Path, latents: int) -> dict[str, Any]:
    if not (packages / "sae_dashboard").is_dir():
        raise UsageError(
            f"{packages} holds no sae_dashboard. Make it: pip install --no-deps --target {packages} sae-dashboard==0.8.0 "
            "eindex-callum dataclasses-json marshmallow==3.26.2 typing-inspect mypy-extensions"
        )
    paths = [str(Path(__file__).parents[2]), str(packages), os.environ.get("PYTHONPATH", "")]
    numbers = [str(number) for number in (latents, N_TOP, PER_TENTH)]
    command = [
        sys.executable,
        "-m",
        "tests.bench.dashboard",
        str(folder / "sae"),
        model,
        str(folder / "tokens.npy"),
    ]
    out = folder / "dashboard.json"
    done = subprocess.run(
        [*command, *numbers, str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode or not out.is_file():
        raise DataError(f"SAEDashboard stopped: {done.stderr.strip().splitlines()[-1:]}. See {packages}.")
    return json.loads(out.read_text(encoding="utf-8"))


def measure_bytes(folder: Path) -> dict[str, Any]:
    """Return the bytes per latent of a browser on disk: the mean of all, and the median over shards of full cards."""
    cards = sorted((folder / "data" / "cards").iterdir())
    facts = read_data(folder / "data" / "run" / "0000.js")
    n, shards = facts["rows"], []
    full = N_TOP + PER_TENTH * TENTHS
    rows = sum(path.stat().st_size for path in (folder / "data" / "rows").iterdir()) / n
    for path in cards:
        value = read_data(path)
        count = {latent: sum(len(g["contexts"]) for g in card["groups"]) for latent, card in value["cards"].items()}
        kept = {latent: card for latent, card in value["cards"].items() if count[latent] == full}
        if len(kept) >= CARDS_PER_SHARD // 4:
            shards.append(len(data_script("data/cards/0000", {**value, "cards": kept})) / len(kept) + rows)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"bytes_per_latent": total / n, "bytes_per_full_latent": statistics.median(shards) if shards else None}


# --- a big folder, and Chromium ----------------------------------------------------------------------------------------


def write_big(folder: Path, *, d_sae: int, n_non_zeros: int) -> dict[str, Any]:
    """Write a synthetic cache with explanations and scores, and its browser into `folder`/out; return what it took.

    The export runs in a process of its own, so that its memory is not hidden by what writing the cache took.
    """
    from tests.bench.synthetic_cache import write_explained

    write_explained(folder / "cache", d_sae=d_sae, n_non_zeros=n_non_zeros)
    with get_context("spawn").Pool(1) as pool:
        took = pool.apply(_export, (folder, d_sae))
    return {"d_sae": d_sae, **took, **measure_bytes(folder / "out")}


def _export(folder: Path, d_sae: int) -> dict[str, Any]:
    """Return CPU seconds per latent of the export, and by how much it raised the memory over what the list takes."""
    from tests.bench.synthetic_cache import explained_source

    source = explained_source(folder / "cache", d_sae)
    held = source.rows()
    source.card(0)
    before, started = _peak(), time.process_time()
    write_browser(folder / "out", source)
    seconds = time.process_time() - started
    del held
    return {"cpu_seconds_per_latent": seconds / d_sae, "memory_growth_bytes": _peak() - before}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _chromium() -> Iterator[Any]:
    import shutil

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        raise UsageError(
            "measuring the page needs Chromium and Playwright: apt-get install chromium; pip install playwright"
        )
    with sync_playwright() as driver:  # pyright: ignore[reportPossiblyUnboundVariable]
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def measure_page(folder: Path, *, repeats: int = 5) -> dict[str, Any]:
    """Return what the page of a folder on disk takes in headless Chromium: medians of seconds, each from a fresh page.

    first_paint, list: from the start of the navigation until the first text, and until the list, are drawn.
    card_by_link: the same until a card is, where the address names a latent (`index.html#latent=N`).
    first_card: from the click on a row of the list, before any card was opened, until its card is drawn.
    next_card: from the key j on a card until the card of the list's next latent is drawn.
    far_card: from a new latent in the address of an open page until its card is drawn; none of it was read before.
    search, search_again: from a letter in the search box until the list is drawn; the first one, and one more.
    sort, filter: from the click until the list is drawn.
    *_cpu: the processor time of the page's main thread meanwhile.

    "Drawn" is the second frame after it is in the document. Every step waits until the page is idle. The chart of the
    latents is there before the first click. Raises: UsageError where Playwright or Chromium is absent.
    """
    with _chromium() as browser:
        times = [_visit(browser, folder, (repeat + 1) / (repeats + 1)) for repeat in range(repeats)]
    return {f"{name}_seconds": statistics.median(one[name] / 1e3 for one in times) for name in times[0]}


def compare_pages(ours: Path, other: Path, *, pairs: int = 6) -> tuple[dict[str, tuple[float, float]], str]:
    """Return both folders' steps, visited in turn, medians of milliseconds, and a table of them with their ratios."""
    times: dict[Path, list[dict[str, float]]] = {ours: [], other: []}
    with _chromium() as browser:
        for pair in range(pairs):
            for folder in (ours, other) if pair % 2 else (other, ours):
                times[folder].append(_visit(browser, folder, (pair + 1) / (pairs + 1)))
    medians = {name: [statistics.median(one[name] for one in of) for of in times.values()] for name in times[ours][0]}
    rows = [(name, f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}") for name, (a, b) in medians.items()]
    return {name: (a, b) for name, (a, b) in medians.items()}, table("ms | ours | other | ratio", rows)


def _visit(browser: Any, folder: Path, share: float) -> dict[str, float]:
    """Return the steps of a fresh page; the far card is that share of the way through the latents."""
    n_latents = json.loads((folder / MARKER).read_text(encoding="utf-8"))["rows"]
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.add_init_script(_STEPS)
    found = _walk(page, (folder / "index.html").resolve().as_uri(), far=int(n_latents * share))
    page.close()
    return found


def _walk(page: Any, index: str, far: int) -> dict[str, float]:
    """Return the milliseconds of each step; `far` is a latent whose card no other step reads."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def used() -> float:
        metrics = {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}
        return 1e3 * metrics["TaskDuration"]

    def loaded(name: str, address: str, wanted: str) -> None:
        page.goto("about:blank")
        before = used()
        page.goto(address)
        found[name] = page.evaluate(f"steps.shown('{wanted}')")
        found[f"{name}_cpu"] = used() - before

    def after(name: str, act: Callable[[], Any], *, event: str, wanted: str) -> None:
        page.evaluate("steps.idle()")
        page.evaluate("([event, wanted]) => steps.begin(event, wanted)", [event, wanted])
        before = used()
        act()
        found[name] = page.evaluate("steps.done")
        found[f"{name}_cpu"] = used() - before

    found: dict[str, float] = {}
    loaded("card_by_link", f"{index}#latent={far}", ".card-page h1")
    loaded("list", index, "tr[data-latent]")
    found["first_paint"] = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    card = ".card-page h1"
    first = page.locator("tr[data-latent] .c-explanation > :first-child").nth(3)
    first.scroll_into_view_if_needed()
    after("first_card", first.click, event="click", wanted=card)
    after("next_card", lambda: page.keyboard.press("j"), event="keydown", wanted=card)
    go = f"location.hash = 'latent={far}'"
    after("far_card", lambda: page.evaluate(go), event="hashchange", wanted=card)
    page.keyboard.press("Escape")
    page.wait_for_selector("tr[data-latent]")
    page.evaluate("steps.idle()")
    page.focus(".search")
    for name in ("search", "search_again"):
        after(name, lambda: page.keyboard.press("1"), event="input", wanted=".found")
    after("sort", page.locator('.latents [data-sort="density"]').click, event="click", wanted=".found")
    after("filter", page.locator('[data-filter="better"]').click, event="click", wanted=".found")
    return found


# `begin` notes when an event comes and resolves `done` when an element was put into the page after it, and is drawn.
_STEPS = """window.steps = {
  drawn: () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))),
  idle: () => new Promise((done) => requestIdleCallback(() => requestIdleCallback(() => done(), { timeout: 500 }), { timeout: 500 })),
  async shown(selector) {
    const there = () => document.querySelector(selector);
    if (!there()) await new Promise((done) => new MutationObserver((_, watch) => {
      if (there()) { watch.disconnect(); done(); }
    }).observe(document, { childList: true, subtree: true }));
    return steps.drawn();
  },
  begin(event, selector) {
    const before = document.querySelector(selector);
    const text = before?.firstChild;
    steps.done = new Promise((done) => window.addEventListener(event, async ({ timeStamp }) => {
      const changed = () => { const now = document.querySelector(selector); return now && (now !== before || now.firstChild !== text); };
      if (!changed()) await new Promise((seen) => new MutationObserver((_, watch) => {
        if (changed()) { watch.disconnect(); seen(); }
      }).observe(document, { childList: true, subtree: true, characterData: true }));
      done(await steps.drawn() - timeStamp);
    }, { capture: true, once: true }));
  },
};"""


def table_of(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = ["| | |", "|---|---|"]
    if export := result.get("export"):
        ours = 1e3 * (export["cache_cpu_seconds_per_latent"] + export["export_cpu_seconds_per_latent"])
        lines += [
            f"| ours, CPU per latent, from text to folder ({export['d_sae']:,} latents, {export['tokens']:,} tokens) | {ours:.1f} ms |",
            f"| of this the export | {1e3 * export['export_cpu_seconds_per_latent']:.1f} ms |",
        ]
        if "ratio" in export:
            theirs = export["dashboard"]
            data, html = (1e3 * theirs[name] / theirs["latents"] for name in ("cpu_seconds", "html_cpu_seconds"))
            lines += [
                f"| SAEDashboard 0.8.0, CPU per latent ({theirs['latents']} latents): data, HTML | {data:.0f} + {html:.0f} ms |",
                *(f"| ratio: {name} | {value:.1f} |" for name, value in export["ratios"].items()),
                f"| SAEDashboard's HTML, bytes per latent | {theirs['html_bytes_per_latent']:,.0f} |",
            ]
        lines += [f"| bytes per latent, all | {export['bytes_per_latent']:,.0f} |"]
        if export["bytes_per_full_latent"]:
            lines += [
                f"| bytes per latent with all {N_TOP + PER_TENTH * TENTHS} passages | {export['bytes_per_full_latent']:,.0f} |"
            ]
    for big in result.get("big", []):
        lines += [
            f"| synthetic, {big['d_sae']:,} latents: CPU per latent | {1e3 * big['cpu_seconds_per_latent']:.1f} ms |",
            f"| memory that the export adds | {big['memory_growth_bytes'] / 1e6:.0f} MB |",
            f"| bytes per latent | {big['bytes_per_latent']:,.0f} |",
        ]
    if page := result.get("page"):
        lines += [
            f"| Chromium, {name.removesuffix('_seconds').replace('_', ' ')} | {1e3 * value:.0f} ms |"
            for name, value in page.items()
        ]
    return "\n".join(lines)
