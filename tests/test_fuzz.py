"""Files that a program or a hand has damaged: every door takes them or says in one of our errors what is wrong.

A bounded run stands in the default suite; `pytest -m slow tests/test_fuzz.py` runs long.
"""

import copy
import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_italian.base.errors import SaeItalianError
from sae_italian.base.storage import write_json

OLD = Path(__file__).parent / "data" / "old"
SHORT, LONG = 30, 3_000  # examples a door
ROOM = 400_000  # characters of text that a recipe may have written
DEEP = 10_000  # brackets one within the other, more than any parser's stack


def no_deadline(n: int) -> Any:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=n, deadline=None, suppress_health_check=checks, database=None, derandomize=n == SHORT)


ODD = st.sampled_from(
    [None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**400, 0.5, -1.5, 1e308, float("nan"), float("inf"), "", "x", "²",
     "1e9", "../..", "/", "a\0b", "\ud800", "è" * 300, [], [[]], [None], {}, {"": None}, {"x": {"y": []}}, [1, "a", {}]]
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the path of every value in a tree of dicts and lists; of a long list the first and last alone."""
    found = [path]
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1} & set(range(len(value)))):
            found += places(value[index], (*path, index))
    return found


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A tree with one to three of its values replaced by odd ones, taken away, or joined by one that is unknown."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)))
        if not path:
            return copy.deepcopy(draw(ODD))
        *way, last = path
        parent = tree
        for step in way:
            parent = parent[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "remove":
            del parent[last]
        elif action == "add" and isinstance(parent, dict):
            parent["unknown"] = copy.deepcopy(draw(ODD))
        else:
            parent[last] = copy.deepcopy(draw(ODD))
    return tree


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Bytes cut short, with a run overwritten, repeated, or with something put in."""
    at = draw(st.integers(0, len(whole)))
    other = draw(
        st.binary(max_size=20) | st.sampled_from([b"\xff\xfe", b"\xef\xbb\xbf", b"[" * DEEP, b"9" * 6_000, b"\0" * 64])
    )
    action = draw(st.sampled_from(["cut", "overwrite", "insert", "repeat", "only"]))
    match action:
        case "cut":
            return whole[:at]
        case "overwrite":
            return whole[:at] + other + whole[at + len(other) :]
        case "insert":
            return whole[:at] + other + whole[at:]
        case "repeat":
            return whole + whole[at:]
        case _:
            return other


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def as_yaml(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


def file_of(text: bytes, tree: Any = None, write: Any = as_json) -> st.SearchStrategy[bytes]:
    """The contents a door is tried with: damaged bytes and, where it holds a tree, a changed one."""
    return damaged(text) if tree is None else damaged(text) | changed(tree).map(write)


def must_be_said(door: Any, *given: Any) -> None:
    """Walk through a door; only an error of ours may stop it, and it is one line."""
    try:
        door(*given)
    except SaeItalianError as error:
        assert str(error) and "\n" not in str(error), str(error)


# --- the doors ---------------------------------------------------------------------------------------------------------


def read_cache(folder: Path) -> None:
    from sae_italian.cache import FeatureCache

    cache = FeatureCache.open(folder)
    for latent in (0, 7, cache.manifest.d_sae - 1):
        found = cache.latent(latent)
        _ = found.statistics
        found.windows("top", 4)
    cache.document(0)


def read_sae(folder: Path) -> None:
    from sae_italian.saes import load_sae

    load_sae(folder)


def read_config(file: Path) -> None:
    """A number that is mutated may ask for a text of gigabytes, which would be written: the disk here has little room."""
    from sae_italian.training import load_config, text

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(file.parent / "cache"))
        patch.setattr(text, "room_on", lambda _: 2 * ROOM)
        load_config(file)


def read_suite(file: Path) -> None:
    from sae_italian.training import load_suite

    load_suite(file).members()


def read_store(folder: Path) -> None:
    from sae_italian.autointerp.store import Store

    with Store(folder / "autointerp.sqlite", {}, read_only=True) as store:
        store.explanations("rules")
        store.labels()
        store.spending()


def read_corpus(file: Path) -> None:
    from sae_italian.corpora import iter_documents

    list(islice(iter_documents(file), 50))


def resume(folder: Path) -> None:
    from sae_italian.cli import main

    if main(["train", str(folder), "--resume", "--dry-run"]) not in (0, 1, 2):
        raise AssertionError("an exit code nobody promised")


def read_packed(folder: Path) -> None:
    from sae_italian.corpora.pretokenize import PretokenizedCorpus

    corpus = PretokenizedCorpus(folder)
    corpus.counts.lines()
    corpus.windows(0, 1)


def read_board(folder: Path) -> None:
    from sae_italian.benchmark.board import read_entries

    read_entries(folder)


def read_evaluation(folder: Path) -> None:
    from sae_italian.evaluation.card import read_card

    if card := read_card(folder):
        card.markdown()


def read_training(folder: Path) -> None:
    from sae_italian.training.curves import read_curve

    read_curve(folder)


def read_graphs(folder: Path) -> None:
    from sae_italian.browser.graph import graphs_beside
    from sae_italian.cache import FeatureCache

    graphs_beside(FeatureCache.open(folder / "cache"), folder / "report")


MANIFEST = OLD / "cache" / "manifest.json"
CFG = OLD / "sae" / "cfg.json"
RECIPE = b"""model: sae-italian-mini
hook_name: blocks.1.hook_resid_post
corpus: micro-italiano
sae: {architecture: topk, d_sae: 64, k: 4}
training_tokens: 4096
context_size: 64
train_batch_size_tokens: 256
buffer_tokens: 1024
lr: 0.001
seed: 1
"""
SUITE = b"""layers: [0, 1]
sites: [R, A]
expansions: [2]
memory_gb: 2
settings:
  model: sae-italian-mini
  corpus: micro-italiano
  sae: {architecture: topk, k: 4}
  training_tokens: 4096
  context_size: 64
"""
JSONL = "".join(json.dumps({"text": f"La città numero {n} è bella.", "id": n}) + "\n" for n in range(5)).encode()
CSV = 'id;text\n1;"Il sole, la luna"\n2;Perché no?\n3;"Una ""citazione"" qui"\n'.encode()
CONLLU = b"# sent_id = 1\n# text = Il cane dorme.\n1\tIl\til\tDET\t_\t_\t2\tdet\t_\t_\n2\tcane\tcane\tNOUN\t_\t_\t0\troot\t_\t_\n\n"

AUC = {"auc": 0.9}
BOARD = {
    "saes": {"a": {"hook": "h", "folder": "a"}},
    "hooks": {"h": {"problems": {"p": {"task": "t"}}}},
    "tasks": {"t": {"it": "t", "en": "t", "family": "f", "form": False}},
    **dict.fromkeys(("model", "revision", "seeds", "sources", "most"), 1),
}
SCORED = {key: {"1": [0.9, 0.8], "16": [0.9, 0.8]} for key in ("auc", "twin")}
SCORED |= {"interval": {"16": [0.7, 0.95]}, "permuted": [0.5, 0.6]}
CONTROL = {**dict.fromkeys(("form", "tokens", "dense", "embedded"), AUC), "majority": 0.5}


def packed(folder: Path) -> None:
    from sae_italian.corpora.pretokenize import pretokenize
    from tests.corpora.test_packing import TOKENIZERS

    texts = folder.with_name("texts.jsonl")
    texts.write_text("".join(json.dumps({"text": "La città è bella, il mare no. " * 9}) + "\n" for _ in range(40)))
    pretokenize(str(texts), TOKENIZERS["byte-level"], folder, context_size=16)


def board(folder: Path) -> None:
    for file, value in ({"run_settings": BOARD, "h/controls/results.p": CONTROL, "h/a/results.p": SCORED}).items():
        write_json(folder / f"{file}.json", value)


def evaluated(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(OLD.with_name("card.json"), folder)


def graphs(folder: Path) -> None:
    from sae_italian.circuits.graph import Graph, joined, nodes_of

    shutil.copytree(OLD / "cache", folder / "cache")
    one, nodes = np.ones(1, int), joined([nodes_of("embedding", -1, 0, 1), nodes_of("latent", 1, 0, 3, 1.0)])
    Graph("a", "m", ("a",), 4, nodes, one, np.ones((1, 2)), np.ones(1), 1).save(folder / "graph")
    spec = {"transcoders": json.loads((OLD / "cache/manifest.json").read_text())["sae"]}
    write_json(folder / "graph/run.json", {"kind": "graph", "created": "", "spec": spec})


FOLDERS = {
    # folder to copy, or what makes it; file in it; whether the file is JSON; door
    "cache manifest": (OLD / "cache", "manifest.json", True, read_cache),
    "cache latents": (OLD / "cache", "latents", False, read_cache),
    "cache tokens": (OLD / "cache", "tokens", False, read_cache),
    "sae config": (OLD / "sae", "cfg.json", True, read_sae),
    "sae weights": (OLD / "sae", "sae_weights.safetensors", False, read_sae),
    "store": (OLD / "cache", "autointerp.sqlite", False, read_store),
    "run record": (OLD / "sae", "run.json", True, resume),
    "training record": (OLD / "sae", "run.json", True, read_training),
    "training metrics": (OLD / "sae", "metrics.jsonl", False, read_training),
    "card": (evaluated, "card.json", True, read_evaluation),
    "packed metadata": (packed, "sae_lens.json", True, read_packed),
    "packed record": (packed, "run.json", True, read_packed),
    "packed progress": (packed, "progress.json", True, read_packed),
    "packed counts": (packed, "counts.json", True, read_packed),
    "packed table": (packed, "dataset_info.json", True, read_packed),
    "board settings": (board, "run_settings.json", True, read_board),
    "board results": (board, "h/a/results.p.json", True, read_board),
    "graph record": (graphs, "graph/run.json", True, read_graphs),
    "graph": (graphs, "graph/graph.json", True, read_graphs),
    "graph edges": (graphs, "graph/graph.npz", False, read_graphs),
}
FILES = {
    "recipe": (RECIPE, yaml.safe_load(RECIPE), as_yaml, "recipe.yaml", read_config),
    "suite": (SUITE, yaml.safe_load(SUITE), as_yaml, "suite.yaml", read_suite),
    "jsonl": (JSONL, json.loads(JSONL.splitlines()[0]), as_json, "testi.jsonl", read_corpus),
    "csv": (CSV, None, None, "testi.csv", read_corpus),
    "conllu": (CONLLU, None, None, "testi.conllu", read_corpus),
    "txt": ("La casa è là.\n\nPerché?\n".encode(), None, None, "testi.txt", read_corpus),
}


def fuzz_folder(name: str, tmp_path: Path, n: int) -> None:
    source, file, is_json, door = FOLDERS[name]
    folder = tmp_path / "folder"
    if callable(source):
        source(folder)
        door(folder)  # what is whole is taken
    else:
        shutil.copytree(source, folder)
    target = folder / file
    if target.is_dir():  # a folder of shards: the first
        target = min(path for path in target.rglob("*") if path.is_file())
    whole = target.read_bytes()

    @no_deadline(n)
    @given(file_of(whole, json.loads(whole) if is_json else None))
    def run(text: bytes) -> None:
        target.unlink()
        target.write_bytes(text)
        must_be_said(door, folder)

    run()


def fuzz_file(name: str, tmp_path: Path, n: int) -> None:
    text, tree, write, file, door = FILES[name]
    target = tmp_path / file

    @no_deadline(n)
    @given(file_of(text, tree, write))
    def run(contents: bytes) -> None:
        target.write_bytes(contents)
        must_be_said(door, target)

    run()


def fuzz_answer(n: int) -> None:
    from sae_italian.autointerp.llm.answers import Unusable, read_explanation, read_numbers
    from sae_italian.autointerp.llm.calls import Reply

    bits = st.sampled_from(
        ["<think>", "</think>", "[THINK]", '{"explanation": "', '"}', "[1, 0, 1]", "[", "]", "{", "}", "'", '\\"', "```json\n",
         "```", "\n", "1: 0\n", "²", "9" * 5_000, "[" * 1_000, "è", "\ud800", "<|channel|>final<|message|>", ": ", ","]
    )  # fmt: skip

    @no_deadline(n)
    @given(st.lists(bits | st.text(max_size=5), max_size=12).map("".join))
    def run(text: str) -> None:
        reply = Reply("ok", text)
        for read in (read_explanation, lambda reply: read_numbers(reply, 3, 1)):
            try:
                read(reply)
            except Unusable as reason:
                assert str(reason)

    run()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_damaged_file_of_a_folder_is_taken_or_named(name, tmp_path):
    fuzz_folder(name, tmp_path, SHORT)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_taken_or_named(name, tmp_path):
    fuzz_file(name, tmp_path, SHORT)


def test_an_odd_answer_is_read_or_unusable():
    fuzz_answer(10 * SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FOLDERS, *FILES, "answer"])
def test_for_long(name, tmp_path):
    if name == "answer":
        fuzz_answer(10 * LONG)
    elif name in FOLDERS:
        fuzz_folder(name, tmp_path, LONG)
    else:
        fuzz_file(name, tmp_path, LONG)
