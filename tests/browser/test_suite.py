"""Pages about several SAEs: the overview of a suite, and two SAEs side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import locked
from sae_italian.browser.opening import beside, match_latents
from sae_italian.browser.source import LatentSource
from sae_italian.browser.suite import overview_text, read_suite, write_overview
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache
from sae_italian.cli import main
from sae_italian.evaluation import evaluate
from sae_italian.saes import load_sae
from tests.browser.data_files import read_data


def estimate(value: float | None) -> dict[str, Any]:
    return {
        "value": value,
        "lo": None if value is None else value - 0.01,
        "hi": None if value is None else value + 0.01,
    }


@pytest.fixture
def suite(tmp_path: Path, small_cache: Path) -> Path:
    """A suite of two layers and two widths; one SAE has a cache with scores inside it, one a cache elsewhere."""
    manifest = json.loads((small_cache / "manifest.json").read_text())
    for layer in (3, 1):
        for d_sae in (1024, 256):
            folder = tmp_path / "suite" / f"L{layer}R-{d_sae // 128}x"
            folder.mkdir(parents=True)
            card: dict[str, Any] = {"hook_name": f"blocks.{layer}.hook_resid_post", "d_sae": d_sae}
            card |= {"l0": estimate(8.0 * layer), "explained_variance": estimate(0.5 + layer / 10 + d_sae / 1e4)}
            card |= {"ce_loss_recovered": estimate(0.9), "dead": estimate(0.02 * layer)}
            (folder / "card.json").write_text(json.dumps(card))
    for cache, sae, detection in (("suite/L1R-2x/cache", "elsewhere", 0.81), ("caches/a", "suite/L3R-8x", 0.92)):
        folder = tmp_path / cache
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(manifest | {"sae": str(tmp_path / sae)}))
        scores = {"autointerp": {"detection": estimate(detection), "share_detected": estimate(detection - 0.2)}}
        (folder / "results.json").write_text(json.dumps(scores))
    (tmp_path / "caches" / "a-report").mkdir()
    (tmp_path / "caches" / "a-report" / "index.html").write_text("")
    return tmp_path / "suite"


def test_every_sae_is_a_row_in_order_of_layer_and_width(suite: Path) -> None:
    rows = read_suite(suite, [suite.parent / "caches" / "a"])
    assert [row["name"] for row in rows] == ["L1R-2x", "L1R-8x", "L3R-2x", "L3R-8x"]
    assert [row["detection"]["value"] for row in rows] == [0.81, None, None, 0.92]
    assert rows[0]["explained_variance"]["value"] == pytest.approx(0.6256) and rows[3]["l0"]["value"] == 24.0
    text = overview_text(rows)
    assert "| L1R-8x | 8.0 | 70.2 | 90.0 | 2.0 | – | – |" in text


def test_the_overview_is_a_table_a_picture_and_json(suite: Path, tmp_path: Path) -> None:
    rows = read_suite(suite, [suite.parent / "caches" / "a"])
    rows[1]["name"] = "<script>"
    page = write_overview(rows, tmp_path / "out", "suite <b>").read_text(encoding="utf-8")
    assert (
        "<script" not in page
        and "&lt;script&gt;" in page
        and "<b>" not in page
        and "http" not in page.replace("http-equiv", "")
    )
    assert "90.0<small>[89.0, 91.0]</small>" in page and 'href="../caches/a-report/index.html"' in page
    assert page.count("--good: 1.00") >= 3  # the best explained variance, dead latents and detection
    assert (tmp_path / "out" / "overview.svg").read_text().count("layer") >= 1
    assert json.loads((tmp_path / "out" / "overview.json").read_text())["rows"] == rows
    write_overview(rows, tmp_path / "out", "again")
    with locked(tmp_path / "out"), pytest.raises(UsageError, match="out is being written by another process"):
        write_overview(rows, tmp_path / "out", "again")
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="something else"):
        write_overview(rows, tmp_path / "out", "again")


def test_a_sentences_latents_in_every_sae_of_a_suite(
    small_cache: Path, trained_sae: Path, mini: Any, tmp_path: Path, capsys
):
    """Each SAE's own latents, as shares of their maximum, with links to their cards; one SAE's are those of `latents`."""
    for name in ("L1R-2x", "L1R-again"):
        shutil.copytree(trained_sae, tmp_path / "suite" / name)
        evaluate(load_sae(trained_sae), mini, "micro-italiano", n_tokens=1000, name=name).save(
            tmp_path / "suite" / name
        )
        cache = shutil.copytree(small_cache, tmp_path / "suite" / name / "cache")
        (cache.parent / "cache-report").mkdir()
        (cache.parent / "cache-report" / "index.html").write_text("")
    said = "La ragazza <legge>."
    arguments = ["browse", str(tmp_path / "suite"), f"sentence={said}", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["latents"]
    first, second = ([own for own in found if own["name"] == name] for name in ("L1R-2x", "L1R-again"))
    assert len(first) == 5 and [own["latent"] for own in first] == [own["latent"] for own in second]
    shares = [own["share"] for own in first]
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] <= shares[0] and first[0]["token"] in said
    assert main(["latents", str(small_cache), said, "--json"]) == 0
    alone = {own["latent"]: own["share"] for own in json.loads(capsys.readouterr().out)["strongest"]}
    assert shares == sorted(alone.values(), reverse=True)[:5]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "«La ragazza &lt;legge&gt;.»" in page and f'cache-report/index.html#latent={first[0]["latent"]}"' in page
    assert main([*arguments[:2], "sentence=", "--out", str(tmp_path / "out")]) == 0  # none: the overview alone
    assert "ragazza" not in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_suite_without_caches_has_no_latents_for_a_sentence(suite: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(suite / "L1R-2x" / "cache")
    assert main(["browse", str(suite), "sentence=Ciao"]) == 2 and "has a cache" in capsys.readouterr().err


def test_caches_of_a_suite_that_was_moved_are_told_of_it(suite: Path) -> None:
    moved = suite.rename(suite.with_name("moved"))
    with pytest.raises(
        UsageError, match=r"caches/a was built with an SAE .*cache build .*moved/NAME --out .*caches/a --resume"
    ):
        read_suite(moved, [moved.parent / "caches" / "a"])


def test_a_folder_without_cards_and_a_broken_card_are_named(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        read_suite(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="sae-italian evaluate"):
        read_suite(tmp_path / "caches")
    (suite / "L1R-2x" / "card.json").write_text('{"hook_name": "blocks.1.hook_resid_post"}')
    with pytest.raises(DataError, match=r"L1R-2x/card.json cannot be read"):
        read_suite(suite)


def test_an_sae_beside_itself_matches_itself(small_cache: Path, trained_sae: Path, mini: Any, tmp_path: Path) -> None:
    cache = FeatureCache.open(shutil.copytree(small_cache, tmp_path / "cache"))
    source, bare = LatentSource(cache, mini.tokenizer, sae=load_sae(trained_sae)), LatentSource(cache, mini.tokenizer)
    matches = match_latents(source, source)
    assert matches["latent"] == matches["back"] == list(range(256))
    assert beside(source, source).facts() == {
        "mean_cosine": pytest.approx(1, abs=1e-4),
        "share_near": 1.0,
        "share_mutual": 1.0,
    }
    with pytest.raises(UsageError, match="is not at hand"):
        match_latents(source, bare)
    index = write_browser(tmp_path / "out", source, other=beside(source, source))
    run, other = (read_data(index.parent / part / "run" / "0000.js") for part in ("data", "other"))
    assert other["run"]["sae"] in run["compare"] and run["compare"] != run["run"]["sae"]
    assert read_data(index.parent / "data" / "matches" / "0000.js")["latent"] == list(range(256))


def test_the_command_tells_a_suite_from_a_cache(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["browse", str(suite), str(suite.parent / "caches" / "a"), "--out", str(tmp_path / "out")]) == 0
    assert "\nL3R-8x  " in capsys.readouterr().out and (tmp_path / "out" / "index.html").is_file()
    assert main(["browse", str(suite), "missing", "--out", str(tmp_path / "out")]) == 2
    assert "missing is not a feature cache" in capsys.readouterr().err
    (tmp_path / "old").mkdir()
    manifest = json.loads((suite.parent / "caches" / "a" / "manifest.json").read_text())
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1}))
    assert main(["browse", str(suite), str(tmp_path / "old"), "--out", str(tmp_path / "out2")]) == 2
    assert "schema version 1, this program reads 2" in capsys.readouterr().err
    assert main(["browse-suite", str(suite)]) == 2 and "`browse SUITE" in capsys.readouterr().err
    for odd in (["--latent", "0"], ["--serve"], ["--compare", "x"], ["--to-space", "a/b"], ["--sae", "x"]):
        assert main(["browse", str(suite), *odd, "--out", str(tmp_path / "out3")]) == 2, odd
        assert f"{odd[0]} is for a cache" in capsys.readouterr().err and not (tmp_path / "out3").exists()
