"""Text, caches and SAEs that are not what they should be, at every door that takes one: one line that names it, exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sae_italian.base.storage import locked
from sae_italian.cli import main

TEXT = "La casa di Anna è bella e grande, però il sole la scalda già perché è lunedì. "
SMALL = ["training_tokens=2048", "buffer_tokens=2048", "train_batch_size_tokens=512", "lr_warm_up_steps=1"]
CORPORA = {  # by what is wrong, the file and what the line says
    "column": ("col.csv", "col.csv has no column 'text'; it has 'Titolo', 'Note'. .*--text-column"),
    "empty": ("empty.txt", "(corpus|split of corpus) .*empty.txt' has no document with text in it"),
    "blank": ("blank.jsonl", r"corpus .*blank.jsonl' has no document with text in it \(5 empty\)"),
    "broken": ("broken.jsonl", "broken.jsonl, line 1: not JSON"),
}
DOORS = {  # a command by the file or folder that is wrong, the SAE and a folder to write to
    "train": lambda c, s, out: ["train", "mini/topk", f"corpus={c}", *SMALL, "--out", out],
    "dry run": lambda c, s, out: ["train", "mini/topk", f"corpus={c}", *SMALL, "--dry-run"],
    "suite": lambda c, s, out: ["train", "mini/suite", f"corpus={c}", *SMALL, "--out", out],
    "evaluate": lambda c, s, out: ["evaluate", s, "--corpus", c, "--tokens", 500],
    "doctor": lambda c, s, out: ["saes", "doctor", s, "--corpus", c, "--tokens", 512],
    "cache": lambda c, s, out: ["cache", "build", s, "--corpus", c, "--tokens", 500, "split=all", "--out", out],
    "context": lambda c, s, out: ["shift", s, "--by", "context", "--corpus", c, "--tokens", 600, "--out", out],
    "genres": lambda c, s, out: ["shift", s, "--by", "genre", "--buckets", f"a={c}", f"b={c}", "--out", out],
    "languages": lambda c, s, out: ["language", s, "--languages", f"it={c}", f"en={c}", "--out", out],
    "pretokenize": lambda c, s, out: ["corpora", "pretokenize", c, "--model", "sae-italian-mini", "--out", out],
    "jumprelu": lambda c, s, out: ["export", s, "--to", "jumprelu", "--corpus", c, "--out", out],
    "choose k": lambda c, s, out: ["choose-k", "mini/topk", "--grid", "4,8,16", f"corpus={c}", "--out", out],
    "benchmark": lambda c, s, out: ["benchmark", s, "--texts", f"a={c}", f"b={c}", "--out", out],
}
CACHES = {
    "older": ({"schema_version": 1}, "schema version 1, this program reads 2. Build it again."),
    "unfinished": ({"complete": False}, "is an unfinished cache; run .*--resume"),
    "damaged": ("latents/*", "latents/00000_00255.safetensors is damaged: its checksum differs"),
    "without tokens": ("tokens/*", r"tokens/0000\d.safetensors is (missing|damaged)"),
}
CACHE_DOORS = {
    "autointerp": lambda c, out: ["autointerp", c, "--n-latents", 10, "--no-random-control"],
    "browse": lambda c, out: ["browse", c, "--out", out],
    "card": lambda c, out: ["browse", c, "--latent", 3],
    "delphi": lambda c, out: ["export", c, "--to", "delphi", "--out", out],
    "datasets": lambda c, out: ["export", c, "--to", "datasets", "--out", out],
    "neuronpedia": lambda c, out: ["export", c, "--to", "neuronpedia", "model_id=mini", "set=res-it", "--out", out],
    "latents": lambda c, out: ["latents", c, "La ragazza legge."],
}


RESULTS = {  # commands that write their result into a folder of their own, and no run that could be resumed
    "language": lambda s, cache, out: ["language", s, "--ud", "micro-italiano", "--out", out],
    "shift": lambda s, cache, out: ["shift", s, "--by", "context", "--out", out],
    "geometry": lambda s, cache, out: ["geometry", s, "--out", out],
    "ioi": lambda s, cache, out: ["ioi", "sae-italian-mini", "--out", out],
    "tree": lambda s, cache, out: ["tree", s, s, "--latent", 0, "--out", out],
    "agreement": lambda s, cache, out: ["agreement", "sae-italian-mini", "--out", out],
    "tables": lambda s, cache, out: ["export", cache, "--to", "parquet", "--out", out],
}


@pytest.fixture(scope="module")
def sae(topk_sae, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("door") / "sae"
    topk_sae.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "col.csv").write_text("Titolo,Note\n" + "a,b\n" * 9)
    (folder / "empty.txt").write_text("\n \n")
    (folder / "blank.jsonl").write_text('{"text": "  "}\n' * 5)
    (folder / "broken.jsonl").write_text('{"text": \n' + json.dumps({"text": TEXT}))
    return folder


def refused(command: list, capsys, said: str, out: Path) -> None:
    assert main([str(word) for word in command]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("sae-italian:")]
    assert len(lines) == 1 and re.search(said, lines[0]), printed.err[-500:]
    assert "Traceback" not in printed.err and not (out / "sae_weights.safetensors").exists()


@pytest.mark.parametrize("wrong", CORPORA)
@pytest.mark.parametrize("door", DOORS)
def test_text_that_is_none_is_named_at_every_door(door, wrong, texts, sae, tmp_path, capsys):
    name, said = CORPORA[wrong]
    refused(DOORS[door](texts / name, sae, tmp_path / "out"), capsys, said, tmp_path / "out")


@pytest.mark.parametrize("wrong", CACHES)
@pytest.mark.parametrize("door", CACHE_DOORS)
def test_a_cache_that_cannot_be_read_is_named_at_every_door(door, wrong, small_cache, tmp_path, capsys):
    change, said = CACHES[wrong]
    cache = tmp_path / "cache"
    shutil.copytree(small_cache, cache)
    if isinstance(change, dict):
        manifest = json.loads((cache / "manifest.json").read_text())
        (cache / "manifest.json").write_text(json.dumps(manifest | change))
    for file in cache.glob(change) if isinstance(change, str) else ():
        content = bytearray(file.read_bytes())
        content[-len(content) // 3] ^= 255
        file.write_bytes(content)
    refused(CACHE_DOORS[door](cache, tmp_path / "out"), capsys, said, tmp_path / "out")


@pytest.mark.parametrize("door", RESULTS)
def test_a_folder_that_is_not_its_own_is_left_as_it_is_before_any_work(door, sae, small_cache, tmp_path, capsys):
    out = tmp_path / "mine"
    command = RESULTS[door](sae, small_cache, out)
    out.mkdir()
    with locked(out):
        refused(command, capsys, f"{out} is being written by another process", out)
    for name in (f"{door}.json", f"{door}.md", "explanation.parquet"):
        (out / name).write_text("mine")
    refused(command, capsys, f"{out} is not empty and holds no run of ours", out)
    (out / "run.json").write_text('{"kind": "cache", "created": "", "spec": {}}')
    refused(command, capsys, f"{out} holds a cache run, not a {door} run", out)
    assert {file.read_text() for file in out.iterdir() if file.name != "run.json"} == {"mine"}


@pytest.mark.parametrize("door", ["absorption", "against", "jumprelu"])
def test_an_sae_whose_scale_is_not_folded_in_is_refused(door, sae, topk_sae, tmp_path, capsys):
    wrong, out = tmp_path / "wrong", tmp_path / "out"
    topk_sae.save_model(wrong)
    config = json.loads((wrong / "cfg.json").read_text())
    (wrong / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "expected_average_only_in"}))
    command = {
        "absorption": ["absorption", wrong, "minutes=0.01"],
        "against": ["language", sae, "minutes=0.01", "--ud", "micro-italiano", "--against", wrong, "--out", out],
        "jumprelu": ["export", wrong, "--to", "jumprelu", "--tokens", 2000, "--out", out],
    }[door]
    refused(command, capsys, "its scale is not folded in", out)


ELSEWHERE = {  # what an SAE with the right weights says of itself, and the line that refuses it
    "layer": ({"hook_name": "blocks.0.hook_resid_post"}, "blocks.0.hook_resid_post"),
    "no hook": ({"hook_name": None}, "holds no hook_name"),
    "vocabulary": ({"vocabulary": "0" * 16}, "tokenizer has other tokens than the one that the SAE was trained with"),
}


@pytest.mark.parametrize("wrong", ELSEWHERE)
@pytest.mark.parametrize("door", ["browse", "neuronpedia", "train"])
def test_an_sae_of_another_hook_or_vocabulary_is_refused_though_its_weights_are_right(
    door, wrong, trained_sae, small_cache, tmp_path, capsys
):
    told, said = ELSEWHERE[wrong]
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    shutil.copy(trained_sae / "sae_weights.safetensors", own)
    config = json.loads((trained_sae / "cfg.json").read_text())
    (own / "cfg.json").write_text(json.dumps(config | {"metadata": config["metadata"] | told}))
    if door == "train":
        run = json.loads((trained_sae / "run.json").read_text())["spec"]
        layer, sizes = run["hook_name"], [f"sae.{key}={value}" for key, value in run["sae"].items()]
        command = ["train", "mini/topk", f"hook_name={layer}", *sizes, *SMALL, "--from", own, "--out", out]
    else:
        command = [*CACHE_DOORS[door](small_cache, out), "--sae", own]
    refused(command, capsys, said, out)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
def test_text_of_another_encoding_is_read_as_it_is(encoding, tmp_path, capsys):
    file = tmp_path / "testo.txt"
    file.write_bytes("\n\n".join(f"{i} {TEXT}" for i in range(9)).encode(encoding))
    assert main(["corpora", "show", str(file)]) == 0
    assert "La casa di Anna è bella e grande, però il sole la scalda già perché è lunedì." in capsys.readouterr().out


def test_tokens_of_another_model_are_refused_before_anything_is_trained(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.corpora.test_packing import TOKENIZERS

    other, tokenizer = tmp_path / "other", TOKENIZERS["byte-level"]
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} {TEXT * 9}" for i in range(300)))
    command = ["corpora", "pretokenize", str(tmp_path / "a.txt"), "--model", str(other), "--out", str(tmp_path / "p")]
    assert main(command) == 0
    capsys.readouterr()
    for door in ("train", "dry run", "suite", "choose k"):
        said = "was made with another tokenizer than the model's. Pretokenise it for this model."
        refused(DOORS[door](tmp_path / "p", None, tmp_path / door), capsys, said, tmp_path / door)


def test_a_cache_with_another_models_tokenizer_is_refused_by_all_who_read_its_text(small_cache, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.corpora.test_packing import TOKENIZERS

    LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=128, num_hidden_layers=2)).save_pretrained(tmp_path / "m")
    TOKENIZERS["byte-level"].save_pretrained(tmp_path / "m")
    for door in ("autointerp", "browse", "card", "latents"):
        command = [*CACHE_DOORS[door](small_cache, tmp_path / "out"), "--model", tmp_path / "m"]
        refused(command, capsys, "was built with another tokenizer than that of the model given", tmp_path / "out")
