"""Delphi's format, read by a plain reader written from its documentation, against Delphi's own algorithm."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save, save_file
from scipy.sparse import csr_array

from sae_italian.base.errors import DataError, UsageError
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.cache.exchange import _split, export_delphi, find_splits, import_delphi, split_bounds
from sae_italian.cache.shards import spans_by_prefixes
from sae_italian.cli import main
from sae_italian.models.activations import read_activations
from sae_italian.saes import load_sae
from tests.cache.made import made_cache


@pytest.fixture(scope="module")
def cache(small_cache) -> FeatureCache:
    return FeatureCache.open(small_cache)


@pytest.fixture(scope="module")
def exported(small_cache, tmp_path_factory) -> Path:
    return export_delphi(small_cache, tmp_path_factory.mktemp("delphi"), n_splits=3)


def delphis_splits(acts: np.ndarray, tokens: np.ndarray, bounds: list[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
    """What LatentCache.save_splits writes for dense activations [windows, context, d_sae]."""
    locations = np.argwhere(np.abs(acts) > 1e-5)
    values = acts[tuple(locations.T)]
    splits = []
    for first, last in bounds:
        mask = (locations[:, 2] >= first) & (locations[:, 2] <= last)
        here = locations[mask] - [0, 0, first]
        small = (here[:, [0, 2]].max(initial=0) < 2**16).all()
        splits.append(
            {
                "locations": here.astype(np.uint16 if small else np.uint32),
                "activations": values[mask].astype(np.float16),
                "tokens": tokens.astype(np.int64),
            }
        )
    return splits


def test_the_files_are_those_of_delphis_own_cache(cache, exported, mini, trained_sae):
    sae, context = load_sae(trained_sae), cache.manifest.context_size
    tokens = np.asarray(cache.tokens).astype(np.int64).reshape(-1, context)
    with torch.no_grad():
        acts = torch.cat(
            [
                sae.encode(read_activations(mini, part, "blocks.1.hook_resid_post"))
                for part in torch.from_numpy(tokens).split(32)
            ]
        ).numpy()
    acts[np.isin(tokens, mini.tokenizer.all_special_ids)] = 0
    bounds = [(0, 84), (85, 169), (170, 255)]  # torch.linspace(0, 256, 4).long()
    assert exported.name == "layers.1"
    names = {f"{first}_{last}.safetensors" for first, last in bounds}
    assert {file.name for file in exported.iterdir()} == names | {"config.json", "run.json"}
    for (first, last), expected in zip(bounds, delphis_splits(acts, tokens, bounds), strict=True):
        found = load_file(exported / f"{first}_{last}.safetensors")
        for name, array in expected.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert np.array_equal(found["locations"], expected["locations"])
        assert np.array_equal(found["tokens"], expected["tokens"])
        np.testing.assert_allclose(found["activations"], expected["activations"], rtol=1e-3)
        assert (exported / f"{first}_{last}.safetensors").read_bytes() == save(found)  # the container too
    config = json.loads((exported / "config.json").read_text())
    assert config == {  # the names that Delphi reads
        "dataset_repo": "micro-italiano", "dataset_split": "all", "dataset_name": "", "dataset_column": "text",
        "batch_size": 32, "cache_ctx_len": context, "n_tokens": cache.n_positions, "n_splits": 3,
        "model_name": "sae-italian-mini",
    }  # fmt: skip


def read_latents(folder: Path) -> dict[int, list[tuple[int, int, float]]]:
    """What Delphi's loader makes of the splits: per latent, (sequence, place, activation) in the order of the file."""
    latents = {}
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0])):
        split = load_file(file)
        locations = split["locations"].astype(np.int64)
        locations[:, 2] += int(file.stem.split("_")[0])
        order = np.argsort(locations[:, 2], kind="stable")
        for (sequence, place, latent), value in zip(locations[order], split["activations"][order], strict=True):
            latents.setdefault(int(latent), []).append((int(sequence), int(place), float(value)))
    return latents


def test_every_latent_reads_as_in_the_cache(cache, exported):
    latents = read_latents(exported)
    context = cache.manifest.context_size
    for latent in range(cache.manifest.d_sae):
        position, value = cache.latent(latent)
        keep = value > 1e-5
        assert [(s * context + p, v) for s, p, v in latents.get(latent, [])] == list(
            zip(position[keep].tolist(), value[keep].tolist(), strict=True)
        )


def test_ranges_of_latents_with_nothing_in_them(cache, small_cache, tmp_path):
    count = cache.statistics["count"]
    silent = int(count.argmin())
    assert count[silent] == 0, "the SAE of this test should have a dead latent"
    file = export_delphi(small_cache, tmp_path, latents=(silent, silent)) / f"{silent}_{silent}.safetensors"
    split = load_file(file)
    assert split["locations"].shape == (0, 3) and split["locations"].dtype == np.uint16
    assert split["activations"].shape == (0,) and split["activations"].dtype == np.float16


def test_what_delphi_does_not_keep_is_left_out_and_what_fp16_cannot_hold_is_its_largest_number(tmp_path):
    acts = np.zeros((2, 4, 3), np.float32)
    acts[0, 1], acts[1, 2, 0] = [1e6, 5e-6, 2], 1
    made_cache(tmp_path / "c", acts, np.zeros((2, 4), int), np.ones((2, 4), int), per_shard=1)
    split = load_file(export_delphi(tmp_path / "c", tmp_path / "one", n_splits=1) / "0_2.safetensors")
    assert split["locations"].tolist() == [[0, 1, 0], [0, 1, 2], [1, 2, 0]]
    assert split["activations"].tolist() == [65504, 2, 1]
    folder = export_delphi(tmp_path / "c", tmp_path / "more")  # five, or as many as there are latents
    assert json.loads((folder / "config.json").read_text())["n_splits"] == len([*folder.glob("*_*.safetensors")]) == 3
    with pytest.raises(UsageError, match="splits=0: 3 latents"):
        export_delphi(tmp_path / "c", tmp_path / "none", n_splits=0)


def test_places_beyond_65535_are_written_in_full():
    entries = [(0, csr_array((np.ones(2, np.float32), [65_535, 65_536], [0, 2]), (1, 65_537)))]
    facts = {"manifest": SimpleNamespace(context_size=1), "tokens": np.zeros(65_537, int)}
    found = _split(SimpleNamespace(entries=lambda *_: entries, **facts), 0, 0)  # pyright: ignore[reportArgumentType]
    assert found["locations"].tolist() == [[65_535, 0, 0], [65_536, 0, 0]]


def test_the_division_is_delphis():
    for width, n in ((256, 5), (300, 7), (65_536, 5), (10, 10)):
        edges = torch.linspace(0, width, steps=n + 1).long()
        assert split_bounds(0, width - 1, n) == list(zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True))
    assert split_bounds(7, 9, 2) == [(7, 7), (8, 9)]
    with pytest.raises(UsageError, match="splits=4: 3 latents"):
        split_bounds(7, 9, 4)


def test_export_resumes_and_refuses_what_is_there(small_cache, tmp_path):
    folder = export_delphi(small_cache, tmp_path, n_splits=4)
    before = {file.name: file.read_bytes() for file in folder.glob("*_*.safetensors")}
    (folder / "64_127.safetensors").unlink()
    with pytest.raises(UsageError, match="already holds a Delphi export"):
        export_delphi(small_cache, tmp_path, n_splits=4)
    with pytest.raises(UsageError, match="another Delphi export run .*splits"):
        export_delphi(small_cache, tmp_path, n_splits=2, resume=True)
    export_delphi(small_cache, tmp_path, n_splits=4, resume=True)
    assert {file.name: file.read_bytes() for file in folder.glob("*_*.safetensors")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(UsageError, match="holds no run of ours"):
        export_delphi(small_cache, tmp_path, hookpoint="mine", overwrite=True)
    with pytest.raises(UsageError, match="latents 250 to 256 do not exist"):
        export_delphi(small_cache, tmp_path, latents=(250, 256))


# --- import ----------------------------------------------------------------------------------------------------------


def test_a_round_trip_keeps_activations_tokens_and_text(cache, exported, mini, trained_sae, tmp_path):
    sae = load_sae(trained_sae)
    folder, lost = import_delphi(exported, tmp_path / "back", model=mini, sae=sae)
    back = FeatureCache.open(folder, sae=sae, tokenizer=mini.tokenizer, check=True)
    came = "model hook_name sae_hash d_in d_sae k corpus text_column split context_size tokenizer_hash"
    assert {name: getattr(back.manifest, name) for name in came.split()} == {
        name: getattr(cache.manifest, name) for name in came.split()
    }
    assert back.manifest.sae == f"Delphi's cache {exported.resolve()}" and back.manifest.corpus_hash
    assert back.manifest.n_tokens_asked == cache.n_positions and not any("give --" in line for line in lost)
    assert np.array_equal(back.tokens, cache.tokens)
    for latent in range(cache.manifest.d_sae):
        position, value = cache.latent(latent)
        keep = value > 1e-5
        assert np.array_equal(back.latent(latent).position, position[keep])
        assert np.array_equal(back.latent(latent).value, value[keep])
    segments = cache.segments(24)
    for start, length in zip(segments.start[::5].tolist(), segments.length[::5].tolist(), strict=True):
        # A decoder drops the space in front of the first token: the text is the same but for that.
        assert back.spans(start, start + length)[0].strip() == cache.spans(start, start + length)[0].strip()
    assert np.array_equal(np.stack(back.statistics["promoted_ids"]), np.stack(cache.statistics["promoted_ids"]))
    with pytest.raises(UsageError, match="256 latents, the SAE 300"):
        import_delphi(exported, tmp_path / "other", sae=type(sae)(sae.cfg.__class__(**{**vars(sae.cfg), "d_sae": 300})))


def test_without_a_tokenizer_there_is_no_text_and_it_says_so(cache, exported, tmp_path):
    folder, lost = import_delphi(exported, tmp_path / "bare")
    bare = FeatureCache.open(folder, check=True)
    assert any("text and offsets" in line and "--model" in line for line in lost)
    assert any("promoted tokens" in line for line in lost)
    assert bare.manifest.nnz == sum(len(pairs) for pairs in read_latents(exported).values())
    assert bare.spans(0, 5)[0] == "" and len(bare.statistics["promoted_ids"][0]) == 0
    assert bare.statistics["count"].sum() == bare.manifest.nnz


@pytest.mark.parametrize("kind", ["metaspace", "byte-level"])
def test_spans_of_a_window_that_begins_within_a_word(kind):
    from tests.corpora.test_packing import TOKENIZERS

    tokenizer = TOKENIZERS[kind]
    text = "La città è più bella perché c'è il sole."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][2:]
    decoded = tokenizer.decode(ids)
    spans = spans_by_prefixes(ids, decoded, tokenizer)
    covered = {i for start, end in spans.tolist() for i in range(start, end)}
    assert covered == set(range(len(decoded)))
    assert (np.diff(spans[:, 0]) >= 0).all() and spans[0, 0] == 0 and spans[-1, 1] == len(decoded)


def damaged(exported: Path, tmp_path: Path, change, file: str = "85_169.safetensors") -> Path:
    folder = Path(shutil.copytree(exported, tmp_path / "layers.1"))
    arrays = load_file(folder / file)
    change(arrays)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / file)
    return folder


def put(name: str, change):
    def apply(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = change(arrays[name])

    return apply


def first_is(value: float):
    return lambda array: np.concatenate([np.full_like(array[:1], value), array[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("locations", lambda a: a.astype(np.float32)), "locations is float32, uint16 or uint32"),
        (put("activations", lambda a: a.astype(np.int32)), "activations is int32, float16 or float32"),
        (put("locations", lambda a: a[:-1]), "do not fit"),
        (put("locations", lambda a: a[:, :2]), "do not fit"),
        (put("locations", lambda a: a + np.uint16(300)), "beyond 313 windows of 128 tokens and 85 latents"),
        (put("locations", lambda a: np.append(a[:-1], [[312, 127, 85]], axis=0)), "reach .* and 85 latents"),
        (put("locations", lambda a: a.astype(np.int32) - 1), "locations reach"),
        (put("tokens", lambda a: a + 1), "tokens differ from those of 0_84.safetensors"),
        (put("activations", first_is(np.nan)), "1 activations are NaN"),
        (put("locations", lambda a: a[::-1]), "not in the order of the text"),
        (lambda arrays: arrays.pop("tokens"), "holds no tokens. Save it again with save_tokens=True"),
    ],
)
def test_a_damaged_split_is_refused_and_named(exported, tmp_path, change, message):
    folder = damaged(exported, tmp_path, change)
    with pytest.raises(DataError, match=f"85_169.safetensors.*{message}"):
        import_delphi(folder, tmp_path / "out")


def test_a_split_that_is_cut_short_or_missing(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "cut"))
    file = folder / "85_169.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="85_169.safetensors cannot be read"):
        import_delphi(folder, tmp_path / "out")
    file.unlink()
    with pytest.raises(DataError, match="latent 85 should begin a split, 170_255"):
        find_splits(folder)
    with pytest.raises(UsageError, match="no split of a Delphi cache"):
        find_splits(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["²_9", "٠_٩", "0_9_9", "0"])
def test_a_file_of_another_name_is_no_split(tmp_path, name):
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="FIRST_LAST.safetensors was expected"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("{", "config.json cannot be read as JSON"),
        ('{"cache_ctx_len": 128}', "config.json is damaged: an object with model_name"),
        ('{"model_name": "x", "cache_ctx_len": 256}', "says a context of 256, the splits have 128"),
        ('{"model_name": "x", "ctx_len": 256}', "says a context of 256, the splits have 128"),
    ],
)
def test_a_config_that_does_not_fit(exported, tmp_path, content, message):
    folder = Path(shutil.copytree(exported, tmp_path / "layers.1"))
    (folder / "config.json").unlink()
    if content:
        (folder / "config.json").write_text(content)
    with pytest.raises(DataError, match=message):
        import_delphi(folder, tmp_path / "out")


@pytest.mark.parametrize("step", ["write_activations", "finish_cache"])
def test_an_import_that_was_killed_is_resumed_to_the_same_bytes(exported, tmp_path, monkeypatch, step):
    from sae_italian.cache import exchange

    whole, calls = getattr(exchange, step), []

    def killed(*arguments):
        calls.append(1)
        if len(calls) > 1 or step == "finish_cache":
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(exchange, "default_windows", lambda context: 50)
    expected, _ = import_delphi(exported, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(exchange, step, killed)
        with pytest.raises(KeyboardInterrupt):
            import_delphi(exported, tmp_path / "back")
    with pytest.raises(UsageError, match="--resume"):
        import_delphi(exported, tmp_path / "back")
    import_delphi(exported, tmp_path / "back", resume=True)
    assert Manifest.load(tmp_path / "back").files() == Manifest.load(expected).files()


def test_infinite_and_negative_activations_are_counted(exported, tmp_path):
    def change(arrays):
        arrays["activations"][:3] = [np.inf, -1, 0]

    folder, lost = import_delphi(damaged(exported, tmp_path, change), tmp_path / "out")
    assert "2 activations that are not positive" in lost
    assert any(line.startswith("the size of 1 infinite") for line in lost)
    assert Manifest.load(folder).complete


def test_the_commands(small_cache, trained_sae, tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    assert main(["export", str(small_cache), "--to", "delphi", "--out", str(raw), "--latents", "0-9"]) == 0
    assert sorted(file.name for file in (raw / "layers.1").glob("*.safetensors"))[0] == "0_1.safetensors"
    arguments = ["import", str(raw / "layers.1"), "--out", str(out), "--model", "mini"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"\nNext: in Python: LatentDataset('{raw}', ..., modules=['layers.1'])" in printed
    assert "modules=['layers.1']" in printed and "not in it:" in printed and Manifest.load(out).d_sae == 10
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["export", str(small_cache), "--to", "delphi", "--out", str(raw), "--latents", "a-b"]) == 2
    assert "--latents 0-99" in capsys.readouterr().err
    assert main([*arguments[:-2], "--overwrite", "--sae", str(trained_sae)]) == 2
    assert "decoder statistics need both" in capsys.readouterr().err
