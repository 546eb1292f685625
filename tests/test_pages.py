"""What README.md and docs/ tell people to type is what the command line takes."""

import re
import shlex
import shutil
import subprocess
import sys
from itertools import count, product
from pathlib import Path

import pytest

from sae_italian import cli as app
from sae_italian.cache import build_cache
from sae_italian.saes import load_sae

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPETS = [ROOT / "README.md", ROOT / "docs" / "cache.md"]  # these pages' Python is one session


def commands(text: str) -> list[str]:
    """Return every `sae-italian ...` of a page, those in a sentence and those of a block of code."""
    text = text.replace("\\\n", " ")
    spans = [" ".join(span.split()) for span in re.findall(r"`(sae-italian\s[^`]+)`", text)]
    lines = [line.partition("  #")[0].strip() for line in re.findall(r"(?m)^\s*(sae-italian .*)$", text)]
    return [line for line in spans + lines if line.removeprefix("sae-italian ") not in app.COMMANDS]  # the name alone


def as_typed(command: str) -> list[list[str]]:
    """Return a command as one could type it: options in brackets are given, each of `a|b` once, N is a number."""
    text = re.sub(r"\s*\|\s*", "|", re.sub(r"\[|\]|\.\.\.", " ", command))
    choices = [word.replace("N", "3").split("|") if word == "N" else word.split("|") for word in shlex.split(text)[1:]]
    return [list(words) for words in product(*choices)]


WRITTEN = sorted({(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize(("page", "command"), WRITTEN)
def test_a_command_on_a_page_is_one_that_is_taken(page, command):
    for words in as_typed(command):
        app.build().parse_args(words, exit_on_error=False, print_error=False)


def session() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in SNIPPETS)


def test_no_snippet_of_python_uses_a_name_that_nothing_gives():
    code = "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```", session()))
    checked = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    done = subprocess.run(checked, input=code, capture_output=True, text=True, check=False)
    assert code and done.returncode == 0, done.stdout + done.stderr


def test_a_link_or_a_picture_of_a_page_leads_to_a_file_from_where_the_page_is():
    """On GitHub and on the site alike, README's too."""
    linked = {(page, to) for page in LINKING for to in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))}
    local = {(page, to) for page, to in linked if not to.startswith(("http:", "https:", "mailto:"))}
    assert len(local) > 50 and any(to.endswith(".svg") for _, to in local)
    assert not [f"{page.relative_to(ROOT)}: {to}" for page, to in sorted(local) if not (page.parent / to).exists()]


def test_the_pages_are_read_as_they_are_written():
    assert len(WRITTEN) > 30
    assert commands("see `sae-italian browse\nCACHE`\n\n    sae-italian train X  # so\n") == [
        *("sae-italian browse CACHE", "sae-italian train X")
    ]
    assert as_typed("sae-italian a b | c [--n N] ...") == [["a", "b", "--n", "3"], ["a", "c", "--n", "3"]]


# --- the pages' lines, run on the mini model ---------------------------------------------------------------------------

# What a page's words stand for here; what follows --out is a new folder, SAE and SAE_A another folder of the same kind
# when it comes again.
STANDS_FOR = {
    **dict.fromkeys(("MODEL", "NAME", "owner/name", "minerva-1b", "../shared/models/ita-5m"), "sae-italian-mini"),
    **dict.fromkeys(("SAE", "RUN", "SAE_A"), "sae"),
    **dict.fromkeys(("RECIPE", "RICETTA"), "mini/topk"),
    **dict.fromkeys(("CACHE", "A"), "cache"),
    "quickstart/sae": "sae",
    "SAE_B": "sae2",
    "B": "cache2",
    "CONFIG": "mini/topk",
}
TINY = "training_tokens=4096 sae.d_sae=256 train_batch_size_tokens=512 buffer_tokens=4096 lr_warm_up_steps=1 lr_decay_steps=2"
SMALLER = {
    "choose-k": f"{TINY} seeds=1 share=1 card_tokens=1000 --out new",
    "agreement": "--check 40 --n-pairs 2 --thresholds 2",
    "autointerp CACHE --encoder": "n_scored=2",
    "autointerp CACHE --subject": "n_scored=2",
    "autointerp": "--n-latents 8",
    "cache build": "--tokens 2000",
    "corpora pretokenize": "--tokens 5000 --context-size 64",
    "corpora stats": "--documents 50",
    "evaluate": "--tokens 2000",
    "ioi": "--check 40 --n-pairs 2 --thresholds 2",
    "saes doctor": "--tokens 512",
    "shift": "packed=true --tokens 2000",
    "train CONFIG": f"{TINY} --out new",
    "train mini/matryoshka": f"{TINY.replace('sae.d_sae=256 ', '')} --out new",
    "train mini/topk use_cached_activations": f"{TINY} --out new",
}
GIVEN = {"export SAE --to jumprelu": "--tokens 2000 --out new", "export CACHE": "--latents 0-3 --out new"}
SLOW = ("absorption", "autointerp CACHE --subject", "choose-k", "ioi", "agreement", "models check", "shift")
NOT_RUN = {
    "choose-k mini/topk": "minutes; `choose-k CONFIG` stands for it",
    "quickstart --out": "minutes; tests/test_quickstart.py",
    "quickstart mini/topk sae.architecture=topk": "the same",
    "browse quickstart/cache --latent": "a latent of the real quickstart; tests/browser",
    "train CONFIG --processes": "starts processes; tests/training/test_launching.py",
    "train CONFIG shard_latents=": "the same; tests/training/test_shard_runs.py",
    "train RUN --resume --processes": "the same",
    "train mini/topk seeds=": "minutes; tests/analysis/test_seeds.py",
    "train mini/topk corpus=": "minutes; `train CONFIG` stands for it",
    "evaluate runs/mi": "the tutorials' own run; `evaluate SAE` stands for it",
    "cache build runs/mi": "the same",
    "autointerp cache/mi": "the same",
    "browse cache/mi": "the same",
    "autointerp CACHE --explainer llm --n-shown": "needs a language model; tests/autointerp/llm",
    "reproduce": "minutes; tests/papers/test_reproduce.py",
    "cache info nothing-here": "is to fail; tests/test_exit_codes.py",
    "benchmark SAE [SAE": "`benchmark SAE` stands for it",
    "benchmark SAE SAE": "needs treebanks; tests/benchmark",
    "benchmark SAE --out bench --preset full": "needs treebanks and corpora; tests/benchmark",
    "benchmark SAE --out quick": "needs treebanks; tests/benchmark",
    "absorption topk": "needs treebanks and two SAEs; tests/benchmark",
    "benchmark topk topk/seeds": "needs treebanks and seven SAEs; tests/benchmark",
    "benchmark runs/gemma": "needs the real model and treebanks; tests/benchmark",
    "benchmark SAE --sets hub": "needs the hub; tests/benchmark/test_hub_sets.py",
    "benchmark --out": "needs results of another command; tests/benchmark/test_run.py",
    "graph": "needs transcoders of every layer; tests/circuits",
    "saes doctor runs/tc": "the same",
    "export runs/tc": "the same; tests/browser/exports/test_transcoder_set.py",
    "train gemma-3-270m-transcoders": "needs the real model",
    "train mini/transcoders": "minutes; `train CONFIG` stands for it",
    "report wandb": "needs W&B; tests/training/test_publish.py",
    "browse CACHE --to-space": "needs the hub; the same",
    "browse CACHE --serve": "serves until it is stopped; tests/browser/server",
    "browse SUITE": "needs a suite with caches; tests/browser/test_suite.py",
    "explainita": "needs data; tests/autointerp/explainita",
    "language": "needs treebanks; tests/analysis/probes",
    "models fetch": "needs a registry; tests/models/test_gguf.py",
    "models import": "needs a GGUF file; tests/models/test_gguf.py",
    "corpora show wikipedia-it": "needs the hub",
    "evaluate runs/ita": "needs ../shared, minutes; `evaluate SAE` stands for it",
    "train mini/topk model=../shared": "needs ../shared, minutes; `train CONFIG` stands for it",
}


def starts(command: str, table) -> str | None:
    """Return the key of a table that a command begins with, its first word `sae-italian` apart."""
    return next((key for key in table if command.removeprefix("sae-italian ").startswith(key)), None)


def to_run() -> list:
    """Return each way to type each line of a page, without what stands in brackets, once."""
    found = {}
    for _, command in WRITTEN:
        if starts(command, NOT_RUN):
            continue
        for words in as_typed(re.sub(r"\[[^]]*\]", "", command)):
            if words[0] == "shift" and "context" not in words or words[-1] == "model-card":
                continue  # by genre, language and model they need corpora; a model card is an SAE's
            slow = [pytest.mark.slow] if starts(command, SLOW) else []
            found[" ".join(words)] = pytest.param(command, words, marks=slow, id=" ".join(words))
    return list(found.values())


@pytest.fixture(scope="module")
def place(trained_sae, mini, jsonl, cached_activations, tmp_path_factory):
    """A folder like that of a quickstart: two SAEs, their caches with explanations, a folder of texts."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("sae", "sae2"):
        shutil.copytree(trained_sae, folder / name)
    few = {"n_tokens": 12_000, "sae_name": str(trained_sae)}
    build_cache(load_sae(trained_sae), mini, "micro-italiano", folder / "cache", **few)
    shutil.copytree(folder / "cache", folder / "cache2")
    shutil.copytree(jsonl.parent, folder / "testi")
    (folder / "activations").symlink_to(cached_activations)
    (folder / "quickstart").symlink_to(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert app.main(["autointerp", "cache", "--n-latents", "8", "--no-random-control"]) == 0
    return folder


def filled_in(command: str, words: list[str], new: Path) -> list[str]:
    """Return a page's words with files that are here, and its sizes as small as they go."""
    typed, outs = [], count()
    for word in words:
        name = "mini/topk" if words[0] == "train" and word == "NAME" else STANDS_FOR.get(word, word)
        if typed and typed[-1] == "--out" or word == "new":
            name = f"{new}{next(outs)}" + Path(word).suffix
        elif word == "SAE" and "sae" in typed:
            name = "sae2"
        typed.append(name)
    for table in (SMALLER, GIVEN):
        more = table.get(starts(command, table) or "", "").split()
        given = [word for word in more if word.startswith("--") and word in typed]  # a size of the page's own
        for option in given:
            typed[typed.index(option) + 1] = more.pop(more.index(option) + 1)
            more.remove(option)
        typed += [f"{new}{next(outs)}" if word == "new" else word for word in more]
    return typed


@pytest.mark.parametrize(("command", "words"), to_run())
def test_a_command_on_a_page_does_what_it_says(command, words, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    code = app.main(filled_in(command, words, tmp_path / "new"))
    told = capsys.readouterr()
    assert code == 0, told.err
    assert told.out.strip()


def test_what_is_not_run_is_on_a_page():
    commands = [command.removeprefix("sae-italian ") for _, command in WRITTEN]
    for told in (*NOT_RUN, *SMALLER, *GIVEN, *SLOW):
        assert any(command.startswith(told) for command in commands), told
    assert len(to_run()) > 20


def test_the_first_snippet_runs_but_for_what_needs_the_hub_and_minutes(place, monkeypatch):
    """Lines that load Minerva or train are left out; the stock runner is tests/training/test_run.py's."""
    monkeypatch.chdir(place)
    code = "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```", session()))
    kept = [line for line in code.splitlines() if not re.search(r"minerva|mc4|\.run\(|load_config\(", line)]
    names: dict = {}
    exec("\n".join(kept), names)
    assert len(names["position"]) == len(names["value"]) and names["latent"].windows("top", 40).shown()
