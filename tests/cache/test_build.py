"""Building: several SAEs at once, units in any order, kills, locks, and what cannot be built."""

import errno
import json
import os
import pickle
import random
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from sae_italian.base.errors import DataError, UsageError
from sae_italian.cache import FeatureCache, Manifest, build_cache, build_caches, layout, shards
from sae_italian.cache import build as build_module
from sae_italian.cache.exchange import export_delphi, export_rows, import_delphi
from sae_italian.cli import main
from sae_italian.cli.analysis import _sae_of
from sae_italian.corpora import PackedBlock, TextDocument, iter_documents
from sae_italian.corpora.packing import NO_DOCUMENT
from tests import fresh
from tests.cache.test_cache import digests
from tests.conftest import described

OPTIONS: dict[str, Any] = {"n_tokens": 6000, "windows_per_shard": 8}


def topk(seed: int, hook_name: str = "blocks.2.hook_resid_post", d_sae: int = 256):
    from sae_lens import TopKSAE, TopKSAEConfig

    sae = TopKSAE(TopKSAEConfig(d_in=128, d_sae=d_sae, k=4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.W_dec.copy_(sae.W_enc.T)
    return described(sae, hook_name)


@pytest.fixture(scope="module")
def alone(mini, tmp_path_factory) -> Path:
    return build_cache(topk(1), mini, "micro-italiano", tmp_path_factory.mktemp("alone") / "c", **OPTIONS)


def test_several_saes_share_a_forward_pass_and_their_tokens(mini, alone, tmp_path, monkeypatch):
    forwards = []
    read = shards.read_many
    monkeypatch.setattr(shards, "read_many", lambda *args: forwards.append(args[2]) or read(*args))
    saes = [topk(1), topk(2, "blocks.1.hook_resid_post", 512)]
    outs = build_caches(saes, mini, "micro-italiano", [tmp_path / "a", tmp_path / "b"], **OPTIONS)
    assert len(forwards) == len(Manifest.load(outs[0]).shards)
    assert digests(outs[0]) == digests(alone)
    second = FeatureCache.open(outs[1], sae=saes[1], tokenizer=mini.tokenizer, check=True)
    own = build_cache(saes[1], mini, "micro-italiano", tmp_path / "own", **OPTIONS)
    assert digests(own) == digests(outs[1]) and second.manifest.d_sae == 512
    inodes = [(out / "tokens/00000.safetensors").stat().st_ino for out in outs]
    assert inodes[0] == inodes[1]  # hard links


def test_units_of_work_give_the_same_bytes_in_any_order_and_place(mini, alone, tmp_path):
    def scattered(function, units):
        function = pickle.loads(pickle.dumps(function))  # as for another process
        for unit in random.Random(0).sample(list(units), len(units)):
            yield pickle.loads(pickle.dumps(function(unit)))

    out = build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", run_units=scattered, **OPTIONS)
    assert digests(out) == digests(alone)
    one, other = (Manifest.load(folder) for folder in (out, alone))
    assert one.shards == other.shards and one.ranges == other.ranges and one.stats_sha256 == other.stats_sha256


@pytest.mark.parametrize("stop_at", ["tokens/00002", "acts/00003", "runs/00001", "latents/", "stats.parquet"])
def test_a_full_disk_keeps_what_is_finished(mini, alone, tmp_path, monkeypatch, stop_at):
    replace = os.replace

    def full(source, target):
        if stop_at in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("sae_italian.base.storage.os.replace", full)
        with pytest.raises(UsageError, match="full.*--resume"):
            build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", **OPTIONS)
    assert not list((tmp_path / "c").rglob("*.tmp"))
    out = build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", resume=True, **OPTIONS)
    assert digests(out) == digests(alone)


def test_a_resumed_build_learns_where_its_sae_is_now(mini, tmp_path):
    (tmp_path / "moved").mkdir()
    how: Any = {**OPTIONS, "n_tokens": 2000, "resume": True}
    out = build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", sae_name=str(tmp_path / "old"), **how)
    before = digests(out)
    for name, remembered in ((str(tmp_path / "moved"), "moved"), ("in memory", "moved")):
        build_cache(topk(1), mini, "micro-italiano", out, sae_name=name, **how)
        assert Path(FeatureCache.open(out).manifest.sae).name == remembered and digests(out) == before


def test_a_cache_finds_its_sae_where_it_was_or_beside_it_and_no_other(mini, tmp_path):
    """A quickstart's folder is moved whole; of a cache that went alone, and of another SAE there, the way out is told."""
    how: Any = {**OPTIONS, "n_tokens": 2000, "sae_name": str(tmp_path / "old" / "sae")}
    old, new = (
        build_cache(topk(1), mini, "micro-italiano", tmp_path / name / "cache", **how) for name in ("old", "new")
    )
    topk(1).save_model(tmp_path / "old" / "sae")
    assert torch.equal(FeatureCache.open(old).load_sae().W_dec, topk(1).W_dec)
    (tmp_path / "old").rename(tmp_path / "moved")
    moved = FeatureCache.open(tmp_path / "moved" / "cache")
    for found in (moved.load_sae(), _sae_of(str(moved.folder), None)[0]):  # the latter as `language CACHE` does
        assert torch.equal(found.W_dec, topk(1).W_dec)
    with pytest.raises(UsageError, match=r"old/sae.* If it was moved: sae-italian cache build SAE --out .*new/cache"):
        FeatureCache.open(new).load_sae()
    assert main(["autointerp", str(new)]) == 2 and main(["autointerp", str(new), "--subject"]) == 2
    topk(2).save_model(tmp_path / "old" / "sae")  # trained there since
    with pytest.raises(UsageError, match="another SAE"):
        FeatureCache.open(new).load_sae()
    assert torch.equal(moved.load_sae().W_dec, topk(1).W_dec)
    with pytest.raises(UsageError, match=r"weights hash differs\.$"):
        moved.load_sae(str(tmp_path / "old" / "sae"))


def test_a_folder_that_cannot_be_written(mini, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        build_cache(topk(1), mini, "micro-italiano", "/proc/cache", **OPTIONS)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        build_cache(topk(1), mini, "micro-italiano", tmp_path / "file", **OPTIONS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder(mini, tmp_path):
    (tmp_path / "c").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", **OPTIONS)


HOLD = """import sys, time; from pathlib import Path
from filelock import FileLock
folder = Path(sys.argv[1]); folder.mkdir()
with FileLock(folder / ".lock"):
    print("held", flush=True); time.sleep(60)"""


def test_a_second_builder_is_refused_and_a_dead_one_holds_nothing(mini, alone, tmp_path):
    out = tmp_path / "c"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process"):
            build_cache(topk(1), mini, "micro-italiano", out, **OPTIONS)
        holder.kill()
    assert digests(build_cache(topk(1), mini, "micro-italiano", out, **OPTIONS)) == digests(alone)


def test_a_row_without_text_a_short_corpus_and_folders_that_do_not_fit(mini, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "Il sole. " * 60}) + "\n" + json.dumps({"title": "senza testo"}) + "\n")
    with pytest.raises((DataError, UsageError), match="rows.jsonl|text"):
        build_cache(topk(1), mini, str(rows), tmp_path / "a", n_tokens=None)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "Il sole."}) + "\n")
    with pytest.raises(UsageError, match="fills no window"):
        build_cache(topk(1), mini, str(short), tmp_path / "b", n_tokens=None)
    with pytest.raises(UsageError, match="has no end"):
        build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", n_tokens=None)
    with pytest.raises(UsageError, match="different folders"):
        build_caches([topk(1), topk(2)], mini, "micro-italiano", [tmp_path / "d"] * 2, n_tokens=100)
    shorter, folders = topk(2), [tmp_path / "d", tmp_path / "e"]
    shorter.cfg.metadata.context_size = 64
    with pytest.raises(UsageError, match=r"contexts of \[64, 128\] tokens; choose"):
        build_caches([topk(1), shorter], mini, "micro-italiano", folders, n_tokens=100)


def test_what_was_read_before_a_broken_line_is_kept_and_of_a_short_text_nothing(mini, tmp_path):
    rows, how = tmp_path / "rows.jsonl", {"split": "all", "windows_per_shard": 1}
    good = "".join(json.dumps({"text": f"Il sole numero {i} splende sul mare. " * 20}) + "\n" for i in range(150))
    rows.write_text(good + '{"text": \n')
    with pytest.raises(DataError, match=r"rows.jsonl"):
        build_cache(topk(1), mini, str(rows), tmp_path / "kept", n_tokens=10**7, **how)
    assert len([*(tmp_path / "kept" / "tokens").iterdir()]) > 1  # a lost connection ends so too, and goes on
    rows.write_text(good)
    with pytest.raises(UsageError, match=r"Ask for fewer"):
        build_cache(topk(1), mini, str(rows), tmp_path / "short", n_tokens=10**7, **how)
    assert not (tmp_path / "short").exists()


def test_several_caches_are_all_looked_at_before_the_first_is_replaced(mini, alone, tmp_path):
    out = tmp_path / "a"
    build_cache(topk(1), mini, "micro-italiano", out, **OPTIONS)
    before = digests(out)
    other = tmp_path / "b"
    other.mkdir()
    (other / "thesis.txt").write_text("mia")
    saes = [topk(3), topk(2)]
    with pytest.raises(UsageError, match="b is not empty and holds no run of ours"):
        build_caches(saes, mini, "micro-italiano", [out, other], **OPTIONS, overwrite=True)
    assert digests(out) == before and [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_all_of_a_corpus(mini, jsonl, tmp_path):
    cache = FeatureCache.open(build_cache(topk(1), mini, str(jsonl), tmp_path / "c", n_tokens=None))
    assert cache.manifest.n_tokens_asked is None and cache.n_documents >= 399
    texts = [json.loads(line)["text"] for line in jsonl.read_text().splitlines()]
    assert cache.document(17).text == texts[17] and cache.document(17).source == "prova"


def test_the_text_may_stand_in_a_column_of_another_name(mini, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"corpo": "Il sole illumina la casa. " * 90, "id": "a7"}) + "\n")
    with pytest.raises(UsageError, match="no column .text.; it has .corpo., .id."):
        build_cache(topk(1), mini, str(rows), tmp_path / "c", n_tokens=None)
    cache = FeatureCache.open(build_cache(topk(1), mini, str(rows), tmp_path / "c", n_tokens=None, text_column="corpo"))
    assert cache.manifest.text_column == "corpo" and cache.document(0).text.startswith("Il sole illumina la casa.")


def test_an_sae_that_gives_nan_is_refused(mini, tmp_path):
    sick = topk(1)
    with torch.no_grad():
        sick.b_enc[3] = torch.nan
    with pytest.raises(DataError, match="1 numbers of b_enc are not finite"):
        build_cache(sick, mini, "micro-italiano", tmp_path / "c", **OPTIONS)


def test_another_k_is_another_sae(mini, alone):
    other = topk(1)
    other.cfg.device = "cuda"  # where it is does not make it another
    FeatureCache.open(alone, sae=other)
    other.cfg.k = 5
    with pytest.raises(UsageError, match="configuration differs"):
        FeatureCache.open(alone, sae=other)


def test_values_beyond_and_below_fp16(tmp_path):
    import numpy as np

    value = np.array([1e-12, 1.0, 65504.0, 7e4, 9e9], dtype=np.float32)
    arrays = layout.halves(value)
    assert arrays["wide_at"].tolist() == [3, 4] and arrays["wide_value"].tolist() == value[3:].tolist()
    assert (arrays["value"] > 0).all() and np.isfinite(arrays["value"]).all()
    for here in (slice(0, 5), slice(1, 4), slice(4, 5)):
        whole = np.maximum(value, layout.FP16_TINY)[here]
        assert layout.full_values(arrays, here.start, here.stop).tolist() == whole.tolist()
    assert layout.smallest_uint(2**32 - 1) is np.uint32 and layout.smallest_uint(2**32) is np.uint64


def test_tokens_are_shared_again_after_a_kill_and_copied_where_a_disk_has_no_links(alone, tmp_path, monkeypatch):
    whole, out, file = Manifest.load(alone), tmp_path / "c", "tokens/00000.safetensors"
    out.mkdir()

    def shared() -> Manifest:
        manifest = whole.model_copy(update={"tokens_complete": False, "shards": []})
        shards.share_tokens(alone, whole.shards, out, manifest)
        assert manifest.tokens_complete and {(shard.nnz, *shard.sha256) for shard in manifest.shards[:1]} == {(0, file)}
        return manifest

    assert shared().shards == shared().shards and (out / file).samefile(alone / file)

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shards.os, "link", no_links)
    shared()
    assert not (out / file).samefile(alone / file) and (out / file).read_bytes() == (alone / file).read_bytes()


def test_tokens_of_a_large_vocabulary_and_half_characters_are_kept(tmp_path):
    import numpy as np

    ones = np.ones((1, 2), int)
    block = PackedBlock(np.array([[70_000, 1]]), 0 * ones, 0 * ones, ones, [TextDocument("a\ud800", "1", "")], 0)
    shards.write_token_shard(tmp_path, 0, block)
    arrays = layout.map_arrays(tmp_path / "tokens/00000.safetensors")
    assert arrays["tokens"].tolist() == [[70_000, 1]]
    assert arrays["text"].tobytes().decode("utf-8", "surrogatepass") == "a\ud800"


def test_what_is_0_is_no_activation():
    import numpy as np

    found = shards._positive(torch.tensor([[-0.0, 0, 2], [3, 0, 0]]), np.array([False, True]))
    assert [part.tolist() for part in found] == [[2], [2], [0, 1, 1]]


def test_an_error_of_the_disk_that_safetensors_tells_is_one(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(layout, "save_file", full)
    with pytest.raises(OSError, match="a.safetensors cannot be written: I/O error: No space left"):
        layout.write_arrays(tmp_path, "a.safetensors", {})


def test_the_commands(mini, alone, tmp_path, capsys):
    for seed in (1, 2):
        topk(seed).save_model(tmp_path / f"sae{seed}")
    arguments = ["cache", "build", str(tmp_path / "sae1"), str(tmp_path / "sae2"), "--out", str(tmp_path / "caches")]
    arguments += ["--tokens", "6000", "split=all", "windows_per_shard=8", "--json"]
    assert main(arguments) == 0
    folders = json.loads(capsys.readouterr().out)["caches"]
    assert len(folders) == 2 and digests(Path(folders[0])) == digests(alone)
    assert main(["cache", "info", folders[1], "--verify"]) == 0
    assert "every file is as the manifest says" in capsys.readouterr().out
    assert main(["cache", "info", folders[1], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] >= 6000 and facts["latent_bytes_per_non_zero"] == pytest.approx(6, rel=0.05)
    (Path(folders[1]) / "stats.parquet").write_bytes(b"x")
    assert main(["cache", "info", folders[1], "--verify"]) == 2 and "stats.parquet" in capsys.readouterr().err


BUILD = """import sys, torch; torch.set_num_threads(1)
from sae_italian.cache import build_cache; from sae_italian.models import load_model
from tests.cache.test_build import OPTIONS, topk
build_cache(topk(1), load_model('sae-italian-mini'), 'micro-italiano', sys.argv[1], resume=True, **OPTIONS)"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_at_random_moments(alone, tmp_path, kills):
    out, chance = tmp_path / "c", random.Random(kills)
    marks = ["run.json", "tokens/00001.safetensors", "acts/00000.safetensors", "acts/00003.safetensors", "latents"]
    for number in range(kills):
        process = fresh.Fresh(["-c", BUILD, str(out)])
        mark = out / marks[number % len(marks)]
        while process.poll() is None and not mark.exists():
            time.sleep(0.005)
        time.sleep(chance.random() * 0.3)
        process.kill()
        process.communicate()
    fresh.run(["-c", BUILD, str(out)], check=True)
    assert digests(out) == digests(alone)
    assert not list(out.rglob("*.tmp")) and not (out / "runs").exists()
    assert FeatureCache.open(out, check=True).manifest.complete


def test_activations_that_saelens_kept_are_cached_without_the_model(mini, cached_activations, tmp_path, monkeypatch):
    """Each token's latents are those of the row kept for it; units in other processes and a resumed build the same."""
    from datasets import load_from_disk

    monkeypatch.setattr(shards, "read_many", None)
    sae, rows = topk(1, "blocks.1.hook_resid_post"), load_from_disk(str(cached_activations)).with_format("torch")
    how: dict[str, Any] = {"n_tokens": None, "windows_per_shard": 64}
    cache = FeatureCache.open(build_cache(sae, mini, str(cached_activations), tmp_path / "c", **how), check=True)
    tokens, acts = rows[:]["token_ids"], rows[:]["blocks.1.hook_resid_post"]
    assert (cache.tokens == tokens.flatten().numpy()).all() and cache.manifest.split == "all"
    expected = sae.encode(acts.flatten(0, 1))
    expected[torch.from_numpy(cache.doc == NO_DOCUMENT)] = 0
    for latent in (0, 17, 200):
        position, value = cache.latent(latent)
        assert position.tolist() == expected[:, latent].nonzero()[:, 0].tolist()
        assert value == pytest.approx(expected[position, latent].detach().numpy(), rel=1e-3)
    assert any(
        cache.document(0).text in document.text for document in islice(iter_documents("micro-italiano", "train"), 9)
    )

    def elsewhere(function, units):
        return map(pickle.loads(pickle.dumps(function)), units)

    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(build_module, "transpose", stopped)
        build_cache(sae, mini, str(cached_activations), tmp_path / "d", run_units=elsewhere, **how)
    assert digests(build_cache(sae, mini, str(cached_activations), tmp_path / "d", resume=True, **how)) == digests(
        cache.folder
    )


def stopped(*_):
    raise KeyboardInterrupt


def test_cached_activations_that_do_not_fit_are_named(mini, cached_activations, tmp_path):
    for sae, how, message in (
        (topk(1), {}, "has no 'blocks.2.hook_resid_post', only blocks.1.hook_resid_post, token_ids"),
        (topk(1, "blocks.1.hook_resid_post"), {"context_size": 64}, "windows of 128 tokens .* context_size is 64"),
        (topk(1, "blocks.1.hook_resid_post"), {"n_tokens": 30_000}, "has about 20,480 tokens, fewer than the 30,000"),
    ):
        with pytest.raises(UsageError, match=message):
            build_cache(sae, mini, str(cached_activations), tmp_path / "c", **{"n_tokens": None, **how})


@pytest.mark.parametrize("name", ["n_tokens", "context_size", "windows_per_shard"])
@pytest.mark.parametrize("value", [0, -500, "8"])
def test_sizes_that_cannot_be(mini, tmp_path, name, value):
    """A negative number of tokens ended as a finished cache of a few windows."""
    with pytest.raises(UsageError, match=f"{name} is {value!r}; it must be 1 or more"):
        build_cache(topk(1), mini, "micro-italiano", tmp_path / "c", **{**OPTIONS, name: value})
    assert not (tmp_path / "c").exists()


def test_home_is_found_where_no_shell_replaced_it(mini, tmp_path, monkeypatch):
    """The build died at its last file, which pyarrow wrote to the home, all else to a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    out = build_cache(topk(1), mini, "micro-italiano", "~/c", n_tokens=1000)
    assert out == tmp_path / "home" / "c" and FeatureCache.open("~/c", check=True).n_positions == 1024
    assert export_rows("~/c", "~/rows").parent == out.parent
    delphi = export_delphi("~/c", "~/delphi")
    assert import_delphi(f"~/delphi/{delphi.name}", "~/back").folder == tmp_path / "home" / "back"
    assert not (tmp_path / "~").exists()
