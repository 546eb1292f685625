"""The cache against a dense reference, killed and resumed builds, and what is refused."""

import base64
import hashlib
import html
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import claimed
from sae_italian.cache import FeatureCache, Manifest, build_cache
from sae_italian.cache.build import sae_facts
from sae_italian.cache.layout import map_arrays
from sae_italian.cache.read import SHARES
from sae_italian.cache.stats import write_statistics
from sae_italian.cli import main
from sae_italian.corpora import iter_documents, pack
from sae_italian.corpora.packing import NO_DOCUMENT
from sae_italian.models import load_model
from sae_italian.models.activations import read_activations
from sae_italian.saes import load_sae, weights_hash
from tests.cache.made import made_cache


@pytest.fixture(scope="module")
def cache(small_cache) -> FeatureCache:
    return FeatureCache.open(small_cache)


@pytest.fixture(scope="module")
def dense(mini, trained_sae):
    """Tokens and latents of the same windows, computed densely in one go."""
    sae = load_sae(trained_sae)
    block = next(pack(iter_documents("micro-italiano"), mini.tokenizer, 128, windows_per_block=313))
    tokens = torch.from_numpy(block.tokens)
    with torch.no_grad():
        acts = torch.cat(
            [sae.encode(read_activations(mini, part, "blocks.1.hook_resid_post")) for part in tokens.split(64)]
        )
    acts[tokens == mini.tokenizer.bos_token_id] = 0
    return block, acts.flatten(0, 1).numpy()


def test_every_latent_equals_the_dense_reference(cache, dense):
    block, acts = dense
    assert np.array_equal(cache.tokens, block.tokens.ravel())
    assert cache.manifest.nnz == np.count_nonzero(acts) == cache.statistics["count"].sum()
    assert len(cache.manifest.shards) > 2
    for latent in range(cache.manifest.d_sae):
        position, value = cache.latent(latent)
        assert np.array_equal(position, np.flatnonzero(acts[:, latent]))
        np.testing.assert_allclose(value, acts[position, latent], rtol=1e-3)


def test_statistics_equal_the_dense_reference(cache, dense):
    block, acts = dense
    stats = cache.statistics
    n_counted = (block.doc != NO_DOCUMENT).sum()
    np.testing.assert_allclose(stats["density"], (acts > 0).sum(0) / n_counted)
    np.testing.assert_allclose(stats["max"], acts.max(0), rtol=1e-3)
    latent = int(stats["count"].argmax())
    alive = acts[acts[:, latent] > 0, latent]
    np.testing.assert_allclose(stats["mean"][latent], alive.mean(), rtol=1e-3)
    assert stats["histogram"][latent].sum() == len(alive)
    np.testing.assert_allclose(stats["quantiles"][latent][2], np.median(alive), rtol=1e-2)
    ids = block.tokens.ravel()
    mass = np.bincount(ids, weights=acts[:, latent])
    assert stats["token_ids"][latent][0] == mass.argmax()
    np.testing.assert_allclose(stats["token_shares"][latent][0], mass.max() / mass.sum(), rtol=1e-3)


def test_promoted_tokens_are_the_logit_lens(cache, mini, trained_sae):
    sae = load_sae(trained_sae)
    with torch.no_grad():
        logits = (sae.W_dec * mini.model.norm.weight) @ mini.lm_head.weight.T
    assert np.array_equal(np.stack(cache.statistics["promoted_ids"])[:, 0], logits.argmax(1).numpy())
    assert np.array_equal(np.stack(cache.statistics["suppressed_ids"])[:, 0], logits.argmin(1).numpy())


def test_text_is_rebuilt_from_offsets(cache):
    texts = [d.text for d, _ in zip(iter_documents("micro-italiano"), range(cache.n_documents), strict=False)]
    segments = cache.segments(32)
    assert (segments.length <= 32).all() and segments.length.sum() == (cache.doc != NO_DOCUMENT).sum()
    for start, length, doc in list(zip(*segments, strict=True))[::17]:
        text, spans = cache.spans(start, start + length)
        assert text in texts[doc] and cache.document(doc).text == texts[doc]
        assert spans[0][0] == 0 and spans[:, 1].max() == len(text)
        assert (cache.doc[start : start + length] == doc).all()


def test_parts_of_documents_are_drawn_by_a_salted_hash_of_their_text(cache):
    ends, parts, others = np.cumsum(SHARES), cache.document_parts(), cache.document_parts(seed=np.int64(5))
    for found, seed in ((parts, 0), (others, 5)):
        for number in range(0, cache.n_documents, 7):
            text, salt = cache.document(number).text.encode(), seed.to_bytes(8, "little")
            drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8, salt=salt).digest(), "big") / 2**64
            assert found[number] == sum(drawn >= end for end in ends[:-1])
    assert (parts != others).any() and set(parts.tolist()) == {0, 1, 2}


def test_what_decides_a_caches_bytes(cache, topk_sae):
    manifest = cache.manifest
    same = manifest.model_copy(update={"versions": {"torch": "0"}, "sae": "elsewhere", "complete": False})
    assert same.identity() == manifest.identity()
    for change in ({"corpus": "b"}, {"n_tokens_asked": 1}, {"sae_hash": "x"}, {"split": "train"}, {"context_size": 64}):
        assert manifest.model_copy(update=change).identity() != manifest.identity(), change
    facts = sae_facts(topk_sae)
    assert (facts["model"], facts["hook_name"]) == ("sae-italian-mini", "blocks.2.hook_resid_post")
    assert (facts["d_in"], facts["d_sae"], facts["k"]) == (128, 300, 8)
    assert facts["sae_hash"] == weights_hash(topk_sae) and len(facts["sae_config_hash"]) > 8
    assert set(facts) <= set(Manifest.model_fields)


def test_six_bytes_per_non_zero(cache):
    latents = sum(file.stat().st_size for file in (cache.folder / "latents").iterdir())
    assert latents == pytest.approx(6 * cache.manifest.nnz, rel=0.02)


def test_a_latent_that_does_not_exist(cache):
    for latent in (-1, cache.manifest.d_sae):
        with pytest.raises(UsageError, match="latents 0 to 255"):
            cache.latent(latent)


@pytest.mark.parametrize(
    "read",
    [
        lambda cache: cache.gather("tokens", np.array([5, -1])),
        lambda cache: cache.gather("tokens", np.array([0, cache.n_positions])),
        lambda cache: cache.latent(0).around(np.array([-1]), 2, 2),
    ],
)
def test_positions_that_do_not_exist(cache, read):
    """Of -1 nothing was read: what memory held stood in its place."""
    with pytest.raises(UsageError, match=f"positions of this cache are 0 to {cache.n_positions - 1}, not"):
        read(cache)


def test_widths_that_are_none(cache):
    latent = cache.latent(int(cache.statistics["count"].argmax()))
    for call in (cache.segments, latent.peaks):
        for width in (0, -1, 2.5):
            with pytest.raises(UsageError, match="width is .* it must be 1 or more"):
                call(width)
    with pytest.raises(UsageError, match="before is -1"):
        latent.around(latent.position[:2], -1, 2)


def test_a_latent_is_plotted_as_a_notebook_shows_it(small_cache):
    cache = FeatureCache.open(small_cache)
    live, dead = int(cache.statistics["count"].argmax()), int(cache.statistics["count"].argmin())
    picture = cache.latent(live).plot()
    share = cache.statistics["count"][live] / cache.n_positions
    assert picture._repr_svg_() == picture and picture.rstrip().endswith("</svg>")
    assert f"latent {live}: active on {share:.2%} of tokens" in picture and "activation" in picture
    assert picture == cache.latent(live).plot()
    assert f"latent {dead}: active on" in cache.latent(dead).plot()


def test_a_notebook_shows_a_cache_and_a_latent_as_one_line_and_a_picture(small_cache):
    """One piece without scripts or addresses, whose picture has its own ground in the light and in the dark."""
    cache = FeatureCache.open(small_cache)
    latent = cache.latent(int(cache.statistics["count"].argmax()))
    for one in (cache, latent):
        shown, line = one._repr_html_(), repr(one)
        assert html.escape(line) in shown and len(line) < 250 and "\n" not in line
        assert "<script" not in shown and not re.search(r"(src|href)=.(?!data:)", shown)
        (data,) = re.findall(r'src="data:image/svg[+]xml;base64,([^"]*)"', shown)
        assert base64.b64decode(data).decode() == one.plot() and "prefers-color-scheme:dark" in one.plot()
    assert f"{cache.manifest.d_sae:,} latents" in repr(cache) and f"{cache.n_positions:,} tokens" in repr(cache)
    dead = np.mean(cache.statistics["count"] == 0)
    assert f"{dead:.1%} of the latents are never active" in cache.plot()


def digests(folder: Path) -> dict[str, str]:
    files = [file for kind in ("tokens", "acts", "latents") for file in (folder / kind).iterdir()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


BUILD = """import sys, torch; torch.set_num_threads(2)
from sae_italian.cache import build_cache; from sae_italian.models import load_model; from sae_italian.saes import load_sae
build_cache(load_sae(sys.argv[1]), load_model('mini'), 'micro-italiano', sys.argv[2], n_tokens=40_000, windows_per_shard=10,
            resume=len(sys.argv) > 3)"""


@pytest.mark.slow
def test_a_killed_build_resumes_to_identical_bytes(trained_sae, tmp_path):
    arguments = [sys.executable, "-c", BUILD, str(trained_sae)]
    subprocess.run([*arguments, str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "killed"
    for n_shards in (2, 11, 25):
        process = subprocess.Popen(
            [*arguments, str(out), *(["resume"] if out.exists() else [])], stderr=subprocess.PIPE, text=True
        )
        started = time.time()
        while process.poll() is None and time.time() - started < 60:
            manifest = out / "manifest.json"
            if manifest.is_file() and len(json.loads(manifest.read_text())["shards"]) >= n_shards:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(UsageError, match="unfinished"):
            FeatureCache.open(out)
    subprocess.run([*arguments, str(out), "resume"], check=True, capture_output=True)
    assert digests(out) == digests(tmp_path / "whole")
    assert not list(out.rglob("*.tmp"))


def test_overwriting_takes_all_of_a_cache_and_its_random_twin_and_leaves_what_is_not_ours(small_cache, tmp_path):
    out = shutil.copytree(small_cache, tmp_path / "cache")
    shutil.copytree(small_cache, out / "random-twin")
    for name in (
        "runs/0.safetensors",
        "random-twin/runs/0.safetensors",
        *(mine := ["mio/config.json", "runs-2/run.json"]),
    ):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    with claimed(out, "cache", {}, overwrite=True):
        left = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert left == {"run.json", ".lock", *mine}


def test_another_cache_in_the_folder_is_refused(small_cache, mini, trained_sae, topk_sae):
    before = digests(small_cache)
    sae = load_sae(trained_sae)
    with pytest.raises(UsageError, match="--resume.*--overwrite"):
        build_cache(sae, mini, "micro-italiano", small_cache, n_tokens=40_000)
    with pytest.raises(UsageError, match="n_tokens_asked was 40000, is now 50000"):
        build_cache(sae, mini, "micro-italiano", small_cache, n_tokens=50_000, windows_per_shard=100, resume=True)
    with pytest.raises(UsageError, match="d_sae was|sae_hash was"):
        build_cache(topk_sae, mini, "micro-italiano", small_cache, n_tokens=40_000, windows_per_shard=100, resume=True)
    halved = load_model("sae-italian-mini", dtype="bfloat16")  # a build begun without a GPU and resumed on one
    with pytest.raises(UsageError, match="model_dtype was None, is now 'bfloat16'"):
        build_cache(sae, halved, "micro-italiano", small_cache, n_tokens=40_000, windows_per_shard=100, resume=True)
    assert digests(small_cache) == before


def test_opening_with_another_sae_or_tokenizer_is_refused(small_cache, mini, trained_sae):
    FeatureCache.open(small_cache, sae=load_sae(trained_sae), tokenizer=mini.tokenizer, check=True)
    for change, said in (
        (lambda sae: sae.W_enc.data.mul_(2), "weights hash differs"),
        (
            lambda sae: setattr(sae.cfg.metadata, "hook_name", "blocks.2.hook_mlp_out"),
            "hook_name is 'blocks.2.hook_mlp_out'",
        ),
    ):
        other = load_sae(trained_sae)
        change(other)
        with pytest.raises(UsageError, match=f"built with another SAE .*; its {said}"):
            FeatureCache.open(small_cache, sae=other)
    with pytest.raises(UsageError, match="a str is no fast tokenizer"):
        FeatureCache.open(small_cache, tokenizer="sae-italian-mini")
    from tests.corpora.test_packing import TOKENIZERS

    with pytest.raises(UsageError, match="another tokenizer"):
        FeatureCache.open(small_cache, tokenizer=TOKENIZERS["byte-level"])


def copied(small_cache: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(small_cache, tmp_path / "copy"))


@pytest.mark.parametrize(
    "file", ["tokens/00001.safetensors", "latents/00000_00255.safetensors", "acts/00000.safetensors"]
)
def test_a_damaged_or_missing_file_is_named(small_cache, tmp_path, file):
    folder = copied(small_cache, tmp_path)
    content = bytearray((folder / file).read_bytes())
    content[-1] ^= 255
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=file.split("/")[1]):
        FeatureCache.open(folder, check=True)
    (folder / file).unlink()
    with pytest.raises(DataError, match="missing"):
        FeatureCache.open(folder, check=True)


def test_a_truncated_file_is_named_when_it_is_read(small_cache, tmp_path):
    folder = copied(small_cache, tmp_path)
    file = folder / "latents/00000_00255.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="00000_00255"):
        FeatureCache.open(folder).latent(0)


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("latents/00000_00255.safetensors", lambda cache: cache.latent(3)),
        ("latents/00000_00255.safetensors", lambda cache: list(cache.entries(0, 9))),
        ("tokens/00001.safetensors", lambda cache: cache.document(cache.manifest.shards[0].n_documents).text),
        ("tokens/00001.safetensors", lambda cache: cache.doc),
        ("acts/00000.safetensors", lambda cache: cache.shard_acts(0)),
        ("stats.parquet", lambda cache: cache.statistics),
    ],
)
def test_changed_bytes_are_refused_when_they_are_first_read(small_cache, tmp_path, file, read):
    folder = copied(small_cache, tmp_path)
    read(FeatureCache.open(folder))
    content = bytearray((folder / file).read_bytes())
    content[-len(content) // 3] ^= 255
    (folder / file).write_bytes(content)
    cache = FeatureCache.open(folder)
    with pytest.raises(DataError, match=f"{file} is damaged") as error:
        read(cache)
    assert "\n" not in str(error.value)


def test_a_cache_of_more_files_than_may_be_open_is_read(tmp_path):
    """As with `ulimit -n 64`: fewer files are held open; where even one is too many, that is what is said."""
    n = 60
    acts = np.random.default_rng(0).random((n, 4, 3)).astype(np.float32)
    doc = np.arange(n)[:, None] + np.zeros((1, 4), np.int64)
    made_cache(tmp_path / "c", acts, doc, np.ones((n, 4), np.int64), per_shard=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = sum(1 for _ in Path("/proc/self/fd").iterdir()) + 24
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (room, before[1]))
        cache = FeatureCache.open(tmp_path / "c")
        assert cache.map_file.cache_info().maxsize == room // 4
        cache.map_file = lru_cache(16)(cache._map)  # what is open beside us in a long test run is not ours
        assert np.array_equal(cache.doc, doc.ravel()) and len(cache.latent(1)) == 4 * n
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        with pytest.raises(UsageError, match="too many files are open"):
            map_arrays(tmp_path / "c/tokens/00000.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_only_documents_with_a_token_are_counted(tmp_path, capsys):
    """Three documents of which the last has no token: its window was cut off."""
    doc = np.array([[NO_DOCUMENT, 0, 0], [NO_DOCUMENT, 0, 2]])
    made_cache(tmp_path / "c", np.ones((2, 3, 2), np.float32), doc, np.ones((2, 3), np.int64), per_shard=1)
    assert Manifest.load(tmp_path / "c").n_documents == 3
    assert main(["cache", "info", str(tmp_path / "c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 2
    assert repr(FeatureCache.open(tmp_path / "c")).endswith("on 6 tokens of 2 documents")


@pytest.mark.filterwarnings("ignore:divide by zero")  # of the lift, as latents do fire on it here
def test_a_special_token_typed_in_a_document_is_not_in_the_densitys_denominator(cache, mini, tmp_path):
    """No latent is read there, so a latent that fires on all other tokens has a density of 1."""
    folder, special = copied(cache.folder, tmp_path), mini.tokenizer.bos_token_id
    opened = FeatureCache(folder, Manifest.load(folder))
    counted = int((opened.doc != NO_DOCUMENT).sum())
    inside = int(opened.tokens[opened.doc != NO_DOCUMENT][7])  # let this be a special token
    n_inside = int((opened.tokens[opened.doc != NO_DOCUMENT] == inside).sum())
    tokenizer = types.SimpleNamespace(all_special_ids=[special, inside])
    model = types.SimpleNamespace(tokenizer=tokenizer, config=mini.config, get_submodule=mini.get_submodule)
    model.get_output_embeddings = mini.get_output_embeddings
    write_statistics(folder, opened.manifest, load_sae(opened.manifest.sae), model)
    opened.manifest.save(folder)
    found = FeatureCache.open(folder).statistics
    assert n_inside > 0
    assert np.allclose(found["density"] * (counted - n_inside), found["count"])


DAMAGED = [
    ("{", "damaged"), ('{"schema_version": 99}', "version 99"), ('{"schema_version": "x"}', "version 'x'"),
    ("[]", "damaged"), ("[" * 100_000, "damaged"), ('{"schema_version": ' + "1" * 6000 + "}", "damaged"),
]  # fmt: skip
CHANGED = [
    ({"d_sae": 1_000_000_000}, "its ranges do not hold latents 0 to 999999999"),
    ({"d_sae": 0}, "d_sae: .*greater than or equal to 1"),
    ({"context_size": 0}, "context_size: .*greater than or equal to 1"),
    ({"context_size": "lots"}, "context_size: "),
    ({"windows_per_shard": 7}, "a shard before the last does not have 7 windows"),
    ({"ranges": []}, "its ranges do not hold"),
    (
        {"complete": False, "shards": [{"index": 1, "n_windows": 1, "n_documents": 1, "sha256": {}}]},
        "its shards are not numbered",
    ),
    ({"shards": "none"}, "shards: "),
    (
        {"complete": False, "shards": [{"index": 0, "n_windows": 1, "n_documents": 1, "sha256": {"[" * 999: ""}}]},
        "a file '",
    ),
    ({"colour": "red"}, "colour: "),
]


@pytest.mark.parametrize(("content", "said"), [*DAMAGED, *CHANGED])
def test_a_manifest_that_cannot_be_read(small_cache, tmp_path, content, said):
    if isinstance(content, dict):
        content = json.dumps(json.loads((small_cache / "manifest.json").read_text()) | content)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=f"manifest.json.*{said}") as error:
        Manifest.load(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="not a feature cache"):
        FeatureCache.open(tmp_path / "nowhere")


def test_a_manifest_of_another_context_than_its_files(small_cache, tmp_path):
    folder = copied(small_cache, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"context_size": 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="00000.safetensors does not hold 6,400 tokens"):
        FeatureCache.open(folder)


def test_values_beyond_fp16_are_kept_and_counted(mini, topk_sae, tmp_path):
    import copy

    loud = copy.deepcopy(topk_sae)
    with torch.no_grad():
        loud.W_enc.mul_(1e6)
    folder = build_cache(loud, mini, "micro-italiano", tmp_path / "loud", n_tokens=1000)
    manifest = Manifest.load(folder)
    assert manifest.n_wide > 0
    cache = FeatureCache.open(folder)
    assert max(cache.latent(i).value.max(initial=0) for i in range(manifest.d_sae)) > 65504
    assert np.isfinite(load_file(folder / "acts/00000.safetensors")["value"]).all()


def test_an_sae_that_never_fires(mini, topk_sae, tmp_path):
    import copy

    dead = copy.deepcopy(topk_sae)
    with torch.no_grad():
        dead.W_enc.zero_()
    cache = FeatureCache.open(build_cache(dead, mini, "micro-italiano", tmp_path / "dead", n_tokens=1000))
    assert cache.manifest.nnz == 0 and len(cache.latent(5).position) == 0
    assert (cache.statistics["density"] == 0).all()


def test_a_context_longer_than_the_models(mini, topk_sae, tmp_path):
    with pytest.raises(UsageError, match="512 positions"):
        build_cache(topk_sae, mini, "micro-italiano", tmp_path / "x", n_tokens=1000, context_size=1024)
    assert not (tmp_path / "x").exists()


def test_a_path_may_be_a_text_wherever_a_notebook_gives_one(small_cache, mini, tmp_path):
    from sae_italian.autointerp import AutointerpConfig, run_autointerp, summarise
    from sae_italian.benchmark import read_entries
    from sae_italian.cache import verify
    from sae_italian.evaluation import read_card

    cache = FeatureCache.open(str(small_cache))
    verify(str(small_cache), cache.manifest)
    assert read_card(str(tmp_path)) is None
    store = run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=2), store=str(tmp_path / "store.sqlite"))
    assert summarise(str(store)) == summarise(store)
    with pytest.raises(UsageError, match="holds no results"):
        read_entries(str(tmp_path))
