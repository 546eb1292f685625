"""The commands as a person types them: what they print, what they refuse, and with which exit code."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_italian import FeatureCache
from sae_italian.base.storage import STOP_SIGNALS
from sae_italian.cli import COMMANDS, facts, main, readable, short_names
from tests import fresh


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    out = capsys.readouterr()
    return code, out.out, out.err


def test_help_is_instant():
    out, seconds = fresh.told_in("-m", "sae_italian.cli", "--help")
    assert "quickstart" in out and seconds < 1  # 0.2 s


def test_models_list_and_show(capsys):
    code, out, _ = run(capsys, "models", "list")
    assert code == 0 and "sapienzanlp/Minerva-1B-base-v1.0" in out and "sae-italian-mini" in out
    code, out, _ = run(capsys, "models", "show", "mini", "--json")
    assert code == 0 and json.loads(out)["n_layers"] == 4
    code, out, _ = run(capsys, "models", "show", "minerva-350m")
    assert code == 0 and "1152" in out


def test_models_check(capsys):
    code, out, _ = run(capsys, "models", "check", "mini", "--json")
    assert code == 0 and json.loads(out)["ok"] and max(json.loads(out)["differences"].values()) < 1e-4
    code, out, _ = run(capsys, "models", "check", "mini", "--italian", "--json")
    assert code == 0 and json.loads(out)["italian"]["agreement, all"] > 0.9


def test_corpora_show(capsys, jsonl, tmp_path):
    code, out, _ = run(capsys, "corpora", "show", "micro-italiano", "--documents", "2", "--json")
    assert code == 0 and len(json.loads(out)["documents"]) == 2
    code, out, _ = run(capsys, "corpora", "show", jsonl, "--documents", "1")
    assert code == 0 and "Documento numero 0. La città è più bella" in out
    odd = "# Titolo\n#hashtag\n\n\n| a | b |\n|---|---|\n![x](y)\nfine"
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": odd}))
    code, out, _ = run(capsys, "corpora", "show", tmp_path / "odd.jsonl")
    assert odd in out.replace("\n  ", "\n"), "what looks like Markdown in a document is its text"


def test_the_home_that_a_shell_leaves_to_us_is_put_in(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "città mia"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told = run(capsys, "corpora", "stats", "micro-italiano", "--documents", 20, "--out=~/a.svg", "--json")
    assert told[0] == 0 and json.loads(told[1])["documents"] == 20
    assert (tmp_path / "città mia" / "a.svg").is_file() and not list(Path().iterdir())


def test_what_the_output_cannot_write_is_no_fault(jsonl):
    program = "import sys; from sae_italian.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "corpora", "show", jsonl, "--documents", "1"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "La citt? ? pi? bella" in done.stdout, done.stderr


def test_what_was_measured_is_printed_where_it_cannot_be_kept(capsys, monkeypatch, trained_sae):
    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("sae_italian.evaluation.card.write_json", refused)
    monkeypatch.setattr("sae_italian.cli.training.write_text", refused)
    code, out, err = run(capsys, "evaluate", trained_sae, "--tokens", 500, "--json")
    assert code == 2 and json.loads(out)["l0"]["value"] == 8
    assert f"{trained_sae} cannot be written to (Permission denied)" in err and err.count("\n") == 1
    code, out, err = run(capsys, "saes", "doctor", trained_sae, "--tokens", 512)
    assert code == 2 and "k = 8" in out and "curves.svg cannot be written to" in err


def test_evaluate_cache_autointerp_browse(capsys, trained_sae, tmp_path):
    """The commands one after the other, each fed with what the one before wrote."""
    code, out, _ = run(capsys, "evaluate", trained_sae, "--tokens", 3000, "--json")
    assert code == 0 and json.loads(out)["l0"]["value"] == 8
    cache = tmp_path / "cache"
    code, out, _ = run(capsys, "cache", "build", trained_sae, "--tokens", 30_000, "--out", cache)
    assert code == 0
    code, out, _ = run(capsys, "cache", "info", cache, "--json")
    info = json.loads(out)
    assert info["complete"] and info["windows"] * 128 >= 30_000 and info["hook_name"] == "blocks.1.hook_resid_post"
    assert run(capsys, "cache", "info", cache, "--verify")[0] == 0
    code, out, _ = run(capsys, "latents", cache, "La ragazza ha perso le chiavi.", "--json")
    found = json.loads(out)
    assert code == 0 and "".join(token["text"] for token in found["tokens"]) == "La ragazza ha perso le chiavi."
    first = found["strongest"][0]
    assert [first["latent"], first["value"]] in found["tokens"][first["token"]]["latents"]
    code, out, _ = run(capsys, "latents", cache, "La ragazza ha perso le chiavi.")
    assert out.splitlines()[2].split()[0] == str(first["latent"]) and f"browse {cache} --latent N" in out
    code, out, _ = run(capsys, "autointerp", cache, "--n-latents", 40, "--json")
    results = json.loads(out)
    assert code == 0 and results["autointerp"]["n_latents"] == 40
    assert results["autointerp"]["shuffled_detection"]["value"] == pytest.approx(0.5, abs=0.1)
    assert results["random"]["n_latents"] == 40 and results["gold"]
    code, out, err = run(capsys, "autointerp", cache, "--n-latents", 41)
    assert code == 2 and "another latents" in err
    assert run(capsys, "autointerp", cache, "--n-latents", 41, "--overwrite", "--no-random-control")[0] == 0
    code, out, _ = run(capsys, "browse", cache, "--out", tmp_path / "report")
    assert code == 0 and (tmp_path / "report" / "index.html").is_file()
    code, out, _ = run(capsys, "browse", cache, "--latent", 3, "--json")
    strongest = json.loads(out)["groups"][0]["contexts"][0]
    code, out, _ = run(capsys, "browse", cache, "--latent", 3)
    assert code == 0 and out.startswith("latent 3: ") and f"{strongest['max']:.2f}" in out and "**" in out
    code, _, err = run(capsys, "browse", cache, "--latent", 999)
    assert code == 2 and "latents 0 to 255" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'. Did you mean 'train'?"),
        (["models", "shwo", "x"], "no command 'models shwo'. Did you mean 'show'?"),
        (["--trian"], "no command '--trian'. Did you mean 'train'?"),
        (["models", "show", "minervaa-1b"], "Did you mean 'minerva-1b'"),
        (["corpora", "show", "nowhere.jsonl"], "neither 'micro-italiano'"),
        (["train", "mini/topkk.yaml"], "Did you mean 'mini/topk'"),
        (["train", "mini/topk.yaml", "sae.kk=3", "--out", "x"], "unknown key 'sae.kk'"),
        (["train", "mini/topk.yaml", "corpus=nope.jsonl", "--out", "x"], "corpus 'nope.jsonl'"),
        (["train", "mini/topk.yaml", "hook_name=blocks.2.hook_resid", "--out", "x"], "hook_name 'blocks.2.hook_resid'"),
        (["train", "mini/topk.yaml", "training_tokens=5", "--out", "x"], "less than one batch"),
        (["train", "mini/topk.yaml", "--out", "x", "training_tokens=5"], "less than one batch"),  # anywhere
        (["train", "--overwrite", "mini/topk.yaml", "--dry-run", "sae.kk=3"], "unknown key 'sae.kk'"),
        (["evaluate", "nowhere"], "neither a folder nor"),
        (["cache", "info", "nowhere"], "not a feature cache"),
        (["latents", "nowhere", "La casa"], "not a feature cache"),
        (["autointerp", "nowhere"], "not a feature cache"),
        (["autointerp", "nowhere", "--n-latents", "0"], "--n-latents is 0; it must be >= 1"),
        (["cache", "build", "nowhere", "--out", "x", "--tokens", "0"], "--tokens is 0; it must be >= 1"),
        (["cache", "build", "a", "a", "--out", "x"], "a was given twice"),
        (["browse", "nowhere"], "not a feature cache"),
        (["export", "nowhere", "--to", "delphi", "--out", "x", "--latents", "9" * 6000], "two numbers were expected"),
        (["browse", "nowhere", "--to-space", "io/my saes"], "'io/my saes' is not of the form owner/name"),
        (
            ["shift", "nowhere", "--by", "genre", "--out", "x", "--buckets", "a=b", "context_size=-1"],
            "is no text or model; settings are given before --by genre",
        ),
        (["export", "nowhere", "--to", "delphi", "--out", "x", "--latents", "²"], "two numbers were expected"),
        (["corpora", "stats", "micro-italiano", "--documents", "-5"], "--documents is -5; it must be >= 0"),
        (["ioi", "mini", "--seed", "-1"], "--seed is -1; it must be >= 0"),
        (["ioi", "mini", "--seed", str(2**63)], "it must be < 9223372036854775808"),
        (["steer", "nowhere", "Il", "--latent", "1.5"], "--latent is '1.5'; a whole number was expected"),  # no 2
        (["evaluate", "nowhere", "--tokens", "999.9"], "--tokens is '999.9'; a whole number was expected"),
        (["cache", "build", "nowhere", "--out", "x", "--tokens", "5e3."], "--tokens is '5e3.'; a whole number"),
        (["evaluate", "nowhere", "--corpus", ""], "--corpus is ''; a name, a number or a text was expected"),
        (["evaluate", "nowhere", "--model="], "--model is ''"),
        (["train", "mini/topk", "--out", "", "--dry-run"], "--out is ''"),  # no working folder
        (["evaluate", "nowhere", "minutes"], "'minutes' is too much; no further word is taken but minutes=N."),
        (["steer", "nowhere", "Il", "gatto", "--latent", "1"], "'gatto' is too much"),
        (["models", "list", "mini"], "'mini' is too much; no further word is taken. Quote"),
        (["absorption"], "no SAE was given"),
        (["tree", "--latent", "3"], "no SAE was given"),
        (["saes", "doctor", ".", "--out", "metrics.jsonl"], '--out is metrics.jsonl; it must have extension "svg".'),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err, err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not Path("x").exists()


def test_an_sae_of_another_width(capsys, trained_sae, tmp_path):
    from tests.bench.train_mini import Recipe, build_model
    from tests.corpora.test_packing import TOKENIZERS

    build_model(Recipe(d_model=64, n_heads=2, d_mlp=64, vocab_size=400)).save_pretrained(tmp_path / "small")
    TOKENIZERS["metaspace"].save_pretrained(tmp_path / "small")
    capsys.readouterr()
    for command in (["evaluate", trained_sae], ["cache", "build", trained_sae, "--out", tmp_path / "c"]):
        code, _, err = run(capsys, *command, "--model", tmp_path / "small")
        assert code == 2 and "d_in" in err and "64" in err and err.count("\n") == 1
    assert not (tmp_path / "c").exists()


def test_a_corpus_without_a_text_column_and_one_too_short(capsys, trained_sae, tmp_path):
    file = tmp_path / "titoli.csv"
    file.write_text("testo,id\nciao,1\n")
    code, _, err = run(capsys, "cache", "build", trained_sae, "--corpus", file, "--out", tmp_path / "c")
    assert code == 2 and "no column 'text'" in err and "it has 'testo'" in err
    code, _, err = run(
        capsys,
        "cache",
        "build",
        trained_sae,
        "--corpus",
        file,
        "--text-column",
        "testo",
        "split=all",
        "--out",
        tmp_path / "c",
    )
    assert code == 2 and "fills no window" in err


def test_the_seeds_of_a_training_are_called_by_it():
    names = short_names(["runs/topk", "runs/topk/seeds/seed-43", "runs/topk/seeds/seed-44/"])
    assert list(names) == ["topk", "topk-seed-43", "topk-seed-44"]
    assert list(short_names(["a/x", "a/x/seeds/seed-1", "b/x"])) == ["a/x", "a/x-seed-1", "b/x"]
    assert list(short_names(["a/x", "b/x"])) == ["a/x", "b/x"]


def test_a_number_or_all(capsys, trained_sae, tmp_path):
    """`--tokens all` is a word where a number may stand."""
    file = tmp_path / "breve.txt"
    file.write_text("Le ragazze sono arrivate ieri sera alla stazione con il treno della notte. " * 400)
    arguments = ("cache", "build", trained_sae, "--corpus", file, "split=all", "--out", tmp_path / "c", "--json")
    told = run(capsys, *arguments, "--tokens", 100_000_000)[2]
    assert "fewer than the 100,000,000 asked for" in told
    fewer = re.search(r"Ask for fewer \(--tokens \d+\)", told)[0].split()[-1].rstrip(")")
    assert run(capsys, *arguments, "--tokens", fewer)[0] == 0  # as was advised, into the same folder
    code, out, _ = run(capsys, *arguments, "--tokens", "all", "--overwrite")
    assert code == 0 and json.loads(out)["cache"] == str(tmp_path / "c")
    code, out, _ = run(capsys, *arguments, "--overwrite")  # nothing said: what there is, as that is less than 300,000
    assert code == 0 and FeatureCache.open(tmp_path / "c").manifest.n_tokens_asked == 300_000
    assert run(capsys, *arguments, "--tokens", 0)[2].strip().endswith("it must be >= 1, or all.")


def test_a_read_only_or_full_disk_is_no_traceback(capsys, trained_sae, tmp_path, monkeypatch):
    from sae_italian.cache import layout

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device", "acts/00000.safetensors")

    monkeypatch.setattr(layout, "save_file", full)
    code, _, err = run(capsys, "cache", "build", trained_sae, "--tokens", 1000, "--out", tmp_path / "c")
    assert code == 2 and "is full" in err and "--resume" in err and err.count("\n") == 1
    monkeypatch.undo()
    assert run(capsys, "cache", "build", trained_sae, "--tokens", 1000, "--out", tmp_path / "c", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        (["autointerp", "CACHE"], "stopped; what is finished is kept, the same command continues."),
        (["cache", "build", "SAE", "--out", "x"], "stopped; what is finished is kept, --resume continues."),
        (["evaluate", "SAE"], "stopped."),
    ],
)
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(capsys, monkeypatch, command, kept):
    def stop(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_italian.saes.load_sae", stop)
    monkeypatch.setattr("sae_italian.saes.loading.load_sae", stop)
    monkeypatch.setattr("sae_italian.cache.FeatureCache.open", stop)
    assert run(capsys, *command) == (130, "", f"sae-italian: {kept}\n")


@pytest.mark.parametrize("number", STOP_SIGNALS[1:], ids=lambda number: number.name)
def test_every_signal_that_asks_to_stop_stops_any_command_as_ctrl_c_does(capsys, monkeypatch, number):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        monkeypatch.setattr("sae_italian.cache.FeatureCache.open", lambda *_, **__: signal.raise_signal(number))
        told = (130, "", "sae-italian: stopped; what is finished is kept, the same command continues.\n")
        assert run(capsys, "autointerp", "CACHE") == told and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,) and data type float64"),
)


@pytest.mark.parametrize("error", FULL, ids=["cuda", "torch", "numpy"])
def test_a_full_memory_is_one_line_that_says_how_to_leave_the_gpu(capsys, monkeypatch, error):
    def full():
        raise error

    monkeypatch.setattr("sae_italian.cli.catalogues.list_models", full)
    code, _, err = run(capsys, "models", "list")
    assert code == 2 and err.count("\n") == 1 and "CUDA_VISIBLE_DEVICES=" in err


def test_a_defect_of_ours_is_not_dressed_up(monkeypatch):
    from sae_italian.cli import catalogues

    monkeypatch.setattr(catalogues, "list_models", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["models", "list"])


def test_a_result_is_readable_in_a_terminal_and_ends_with_the_next_step(capsys, trained_sae):
    code, out, _ = run(capsys, "evaluate", trained_sae, "--tokens", 2000)
    assert (
        code == 0
        and out.startswith("Evaluation card: ")
        and out.endswith(f"\n\nNext: sae-italian cache build {trained_sae} --out FOLDER\n")
    )
    assert "|" not in out and "![" not in out and "\n\n\n" not in out
    values = [line.index(word) for line in out.splitlines() for word in ("value", "8.0") if line.split()[1:2] == [word]]
    assert len(set(values)) == 1 and len(values) >= 1  # columns stand below each other


def test_every_command_has_a_next_step():
    """Its fields are arguments of the command or keys of its result; what else stands there is to be filled in."""
    for name, told in COMMANDS.items():
        assert told["next"], name
        for step in told["next"]:
            words = step.split()
            if words[0] == "sae-italian":
                assert " ".join(words[1:3]) in COMMANDS or words[1] in COMMANDS, step


def test_tables_are_lined_up():
    text = "# Title\n\n| name | n |\n|---|---|\n| a «|» b | 1 |\n| long name | |\n\n![picture](p.svg)\n\nend"
    assert readable(text).splitlines() == [
        *("Title", "", "name       n", "---------  -", "a «|» b    1", "long name", "", "end")
    ]
    assert facts([{"a": 1, "b": None}, {"a": 0.123456}]).splitlines() == [
        "a       b",
        "------  -",
        "1       -",
        "0.1235  -",
    ]
    assert facts({"one": [1, 2], "three": {"x": 1.0}}) == "one    1, 2\nthree  x 1"
