"""The whole way in small, stopped and resumed; and on real Italian where it is at hand."""

import json
import shutil
import time

import pytest

from sae_italian.base.errors import UsageError
from sae_italian.cache import FeatureCache
from sae_italian.quickstart import quickstart, table_of
from tests import fresh

SMALL = (
    "training_tokens=40960",
    "sae.d_sae=256",
    "train_batch_size_tokens=1024",
    "buffer_tokens=8192",
    "lr_warm_up_steps=5",
    "lr_decay_steps=10",
    "dead_feature_window=20",
)
SIZES = {"cache_tokens": 24_000, "card_tokens": 6_000, "latents": 64}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "out"
    return out, quickstart(out, "mini/topk.yaml", *SMALL, **SIZES)


def test_it_ends_with_a_report_and_a_table(done):
    out, results = done
    assert (out / "report" / "index.html").is_file() and results["report"] == str(out / "report" / "index.html")
    table = table_of(results)
    for row in (
        "L0",
        "Explained variance, centred",
        "Explained variance, uncentred",
        "CE loss recovered",
        "Dead latents",
        "Explained latents with detection ≥ 0.8",
        "Shuffled explanations",
        "Token lookup",
        "Random SAE: latents",
        "Gold labels with a latent",
        "Random SAE: gold labels",
    ):
        assert row in table, row
    assert (out / "results.md").read_text() == table + "\n"
    assert results["card"]["l0"]["value"] == 8
    assert results["autointerp"]["shuffled_detection"]["value"] == pytest.approx(0.5, abs=0.06)
    # an SAE of 40 k training tokens; thresholds also face silent segments with the same token, so this is no high mark
    assert results["autointerp"]["share_detected"]["value"] > 0.1


def test_values_and_intervals_stand_in_their_own_columns(done):
    """Every row of the table, the first as the last; and the share of latents is of those that its note counts."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table_of(done[1]).splitlines()[2:]]
    assert all(len(row) == 3 and " to " not in row[1] for row in rows)
    assert all(
        " to " in row[2] for row in rows if row[0].startswith(("Detection", "Fuzzing", "Simulation", "Token lookup"))
    )
    auto = done[1]["autointerp"]
    share = next(row for row in rows if "detection ≥ 0.8 (" in row[0])
    assert f"({auto['n_scored']} scored of {auto['n_latents']})" in share[0].replace(",", "")


def test_nothing_in_the_report_asks_for_the_network(done):
    out, _ = done
    for file in (out / "report").rglob("*"):
        if file.suffix in (".html", ".js", ".css"):
            text = file.read_text(encoding="utf-16" if "data" in file.relative_to(out).parts else "utf-8")
            assert "https://" not in text.replace("https://www.w3.org", "") and "fetch(" not in text, file


def test_a_second_run_is_refused_and_resuming_gives_the_same(done):
    out, results = done
    with pytest.raises(UsageError, match="--resume"):
        quickstart(out, "mini/topk.yaml", *SMALL, **SIZES)
    again = quickstart(out, "mini/topk.yaml", *SMALL, **SIZES, resume=True)
    assert json.dumps(again["autointerp"]) == json.dumps(results["autointerp"])
    assert again["random"] == results["random"] and again["random_gold"] == results["random_gold"]
    assert not (out / "cache" / "random-twin").exists()  # its numbers are kept, its cache is not made again
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert size < 10e6  # 7 MB: 64 of 256 latents on 24,000 tokens
    assert again["card"]["explained_variance"] == results["card"]["explained_variance"]


def test_a_killed_quickstart_resumes_to_the_same_results(done, tmp_path):
    """Kill it while it trains, while it caches and while it explains; each time it goes on from there."""
    out, expected = tmp_path / "killed", done[1]
    sizes = ["--tokens", "24000", "card_tokens=6000", "--n-latents", "64"]
    command = [
        "-m",
        "sae_italian.cli",
        "quickstart",
        "mini/topk.yaml",
        *SMALL,
        *sizes,
        "--out",
        str(out),
        "--resume",
    ]
    marks = (out / "sae" / "metrics.jsonl", out / "cache" / "manifest.json", out / "cache" / "autointerp.sqlite")
    for mark in marks:
        process = fresh.Fresh(command)
        started = time.time()
        while not mark.exists() and process.poll() is None and time.time() - started < 120:
            time.sleep(0.05)
        process.kill()
        assert "Traceback" not in process.communicate()[1] and mark.exists()
    fresh.run(command, check=True, timeout=300)
    results = json.loads((out / "results.json").read_text())
    for part in ("card", "autointerp", "random", "gold", "random_gold"):
        assert _timeless(results[part]) == _timeless(json.loads(json.dumps(expected[part]))), part


def _timeless(part):
    """Leave out when and where it was measured."""
    return (
        {key: value for key, value in part.items() if key not in ("created", "sae")} if isinstance(part, dict) else part
    )


def test_the_report_opens_from_disk_and_shows_true_text(done):
    out, results = done
    browser = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium")
    asked, said = [], []
    with browser.sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"file://{out}/report/index.html")
        page.click("summary")  # measures and controls
        page.wait_for_selector("text=/Varianza spiegata|Explained variance/")
        cache = FeatureCache.open(out / "cache")
        latent = int(cache.statistics["max"].argmax())
        page.goto(f"file://{out}/report/index.html#latent={latent}")
        page.wait_for_selector(".card-page mark")  # the list, which is there before, has marks too
        shown = page.inner_text("body")
    position, value = cache.latent(latent)
    strongest = cache.document(int(cache.doc[position[value.argmax()]]))
    assert strongest.doc_id in shown
    assert not said and all(url.startswith("file://") for url in asked)


@pytest.mark.shared
def test_real_italian(shared, tmp_path):
    """The same call on a model of real text with news and law as corpus."""
    corpus = ",".join(
        str(shared / "data/italian" / name) for name in ("kind_wikinews.jsonl.gz", "italian_law_codes.jsonl.gz")
    )
    results = quickstart(
        tmp_path / "real",
        "mini/topk.yaml",
        *SMALL,
        f"model={shared / 'models/ita-5m'}",
        f"corpus={corpus}",
        "training_tokens=20480",
        cache_tokens=40_000,
        card_tokens=4_000,
        latents=40,
    )
    assert results["gold"] == [] and results["autointerp"]["n_explained"] > 20
    assert results["autointerp"]["detection"]["value"] > 0.6
    assert 0 < results["card"]["explained_variance"]["value"] < 1
