"""Suites: names, groups that fit the memory, one pass for several SAEs, and groups that are resumed."""

import json
import pickle
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from sae_italian.base import units
from sae_italian.base.errors import UsageError
from sae_italian.base.units import map_units
from sae_italian.cli import main
from sae_italian.saes import load_sae
from sae_italian.training import RunSpec, load_spec, load_suite, read_values, train, train_suite
from sae_italian.training.loop import Loop
from sae_italian.training.run import train_group
from sae_italian.training.suite import memory_of, n_parameters
from tests import fresh

SMALL = (
    "expansions=[1, 2]",
    "training_tokens=5120",
    "train_batch_size_tokens=512",
    "buffer_tokens=2048",
    "store_batch_size_prompts=8",
    "lr_decay_steps=2",
    "lr_warm_up_steps=2",
)


def small(*more: str):
    return load_suite("mini/suite", *SMALL, *more)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae_weights.safetensors")


def test_members_are_named_as_in_llama_scope():
    members = load_suite("mini/suite", "layers=[1, 3]", "sites=[R, A, M, TC]", "expansions=[0.5, 32]").members()
    assert list(members)[:4] == ["L1R-0.5x", "L1R-32x", "L1A-0.5x", "L1A-32x"] and len(members) == 16
    assert members["L3A-32x"].hook_name == "blocks.3.hook_attn_out" and members["L3A-32x"].sae["d_sae"] == 4096
    assert members["L1M-0.5x"].hook_name == "blocks.1.hook_mlp_out" and members["L1M-0.5x"].sae["d_sae"] == 64
    transcoder = members["L3TC-32x"]
    assert (transcoder.hook_name, transcoder.hook_name_out) == ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out")
    assert transcoder.sae["architecture"] == "topk_transcoder"
    assert members["L1R-32x"].sae["decoder_init_norm"] == 0.25, "sqrt(2 / 32)"
    assert set(load_suite("mini/suite", "layers=all").members()) >= {"L0R-4x", "L3TC-8x"}


def test_groups_are_as_large_as_fits_and_together_whole():
    suite = small()
    names = list(suite.members())
    assert [list(group) for group in suite.groups()] == [names], "all of it fits one GB"
    one = max(sum(memory_of([spec]).values()) for spec in suite.members().values())
    tight = small(f"memory_gb={1.5 * one}")
    groups = tight.groups()
    assert len(groups) > 1 and [name for group in groups for name in group] == names
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        specs = list(group.values())
        assert sum(memory_of(specs).values()) <= tight.memory_gb
        if after:
            assert sum(memory_of([*specs, next(iter(after.values()))]).values()) > tight.memory_gb, (
                "one more would not fit"
            )


def test_a_large_suite_looks_at_each_sae_once(monkeypatch):
    """Llama Scope's has 256: with a look at every SAE of the group for each of them, its groups took minutes."""
    looks, look = [], RunSpec.sae_config
    monkeypatch.setattr(RunSpec, "sae_config", lambda spec: looks.append(spec.hook_name) or look(spec))
    suite = small("layers=all", f"expansions={list(range(1, 5))}")
    assert sum(map(len, suite.groups())) == len(looks) == 32  # four layers, R and TC


def test_memory_is_reckoned_from_shapes(mini):
    memory = memory_of([small().members()["L1TC-2x"]])
    assert memory["saes_gb"] == pytest.approx(16 * 256 * (128 + 128 + 1) / 1e9)
    assert memory["buffer_gb"] == pytest.approx(2 * 2048 * 128 * 4 / 1e9), "two hooks"
    inner, context = mini.config.intermediate_size, small().members()["L1TC-2x"].context_size
    assert memory["forward_gb"] == pytest.approx(4 * 8 * context * (6 * 128 + 3 * inner) / 1e9)
    halved = memory_of([small("dtype=bfloat16").members()["L1TC-2x"]])
    assert [round(memory[name] / halved[name], 6) for name in memory] == [1, 1, 2, 2, 2]
    member = small("expansions=[1]", "layers=[1]", "sites=[R]")
    exactly = sum(memory_of(list(member.members().values())).values())
    assert len(small("expansions=[1]", "layers=[1]", "sites=[R]", f"memory_gb={exactly!r}").groups()) == 1
    n = sum(parameter.numel() for parameter in mini.parameters())
    assert n_parameters("sae-italian-mini") == n and memory["model_gb"] == pytest.approx(4 * n / 1e9)


def test_a_suite_trains_on_one_pass_and_each_sae_loads(tmp_path, capsys):
    out = tmp_path / "suite"
    assert main(["train", "mini/suite", *SMALL, "layers=[1]", "--out", str(out), "--json"]) == 0
    names = ["L1R-1x", "L1R-2x", "L1TC-1x", "L1TC-2x"]
    assert json.loads(capsys.readouterr().out)["saes"] == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == [*names, "run.json"], "nothing else is left"
    transcoder = load_sae(out / "L1TC-2x")
    assert transcoder.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out" and transcoder.cfg.d_sae == 256
    assert load_sae(out / "L1R-1x").cfg.architecture() == "topk"
    assert json.loads((out / "L1R-2x" / "run.json").read_text())["kind"] == "train"
    stamp = (out / "L1R-2x" / "sae_weights.safetensors").stat().st_mtime_ns
    with pytest.raises(UsageError, match="--overwrite"):
        train_suite(small("layers=[1]"), out)
    assert main(["train", str(out), "--resume", "--json"]) == 0, "the folder says what it is"
    assert json.loads(capsys.readouterr().out)["saes"] == [str(out / name) for name in names]
    assert (out / "L1R-2x" / "sae_weights.safetensors").stat().st_mtime_ns == stamp


def test_together_or_alone_the_weights_are_the_same(tmp_path):
    """SAEs of a group see the batches that a run of their own would see, from the same start."""
    words, out = (*SMALL, "layers=[1]", "sites=[R]"), tmp_path / "suite"
    together = train_suite(read_values("mini/suite", *words), out)  # plain dicts, as one reads them or makes them
    alone = train(load_suite("mini/suite", *words).members()["L1R-2x"].model_dump(), tmp_path / "alone")
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(together[1]).items())
    assert train_suite(str(out), out, resume=True) == together  # and a suite's folder names it


def test_a_group_is_a_unit_of_work_and_resumes_where_it_was_stopped(tmp_path, monkeypatch):
    suite = small("layers=[1]", "sites=[R]", "checkpoint_every_tokens=1024")
    whole = train_suite(suite, tmp_path / "whole")
    group = "group-000", suite.groups()[0]
    function, out, group = pickle.loads(pickle.dumps((train_group, tmp_path / "stopped", group)))
    original, calls = Loop._step, []

    def stop_at_seven(self):
        calls.append(self.first.n_steps)
        if self.first.n_steps == 7:
            raise OSError("the machine went away")
        original(self)

    monkeypatch.setattr(Loop, "_step", stop_at_seven)
    with pytest.raises(OSError, match="went away"):
        function(out, group)
    assert list((out / "group-000" / "checkpoints").iterdir()), "a state was saved"
    with pytest.raises(UsageError, match="--resume"):
        load_sae(out / "L1R-1x")
    monkeypatch.setattr(Loop, "_step", original)
    folders = function(out, group)
    for left, right in zip(folders, whole, strict=True):
        assert all(torch.equal(value, weights(right)[name]) for name, value in weights(left).items())
    stamp = (folders[0] / "sae_weights.safetensors").stat().st_mtime_ns
    assert function(out, group) == folders
    assert (folders[0] / "sae_weights.safetensors").stat().st_mtime_ns == stamp, "a finished group is left alone"
    assert not (out / "group-000").exists()


def test_a_suite_that_was_stopped_goes_on_with_settings_that_may_change(tmp_path, monkeypatch):
    """The corpus that ended early is repeated, as the message asks for; what decides the result is still refused."""
    out, original = tmp_path / "suite", Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self: 1 / 0 if self.first.n_steps == 3 else original(self))
    with pytest.raises(ZeroDivisionError):
        train_suite(small("layers=[1]", "sites=[R]", "checkpoint_every_tokens=1024"), out)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="lr was 0.004, is now 1"):
        train_suite(small("layers=[1]", "sites=[R]", "lr=1"), out, resume=True)
    changed = small("layers=[1]", "sites=[R]", "repeat_corpus=true", "checkpoint_every_tokens=2048")
    assert all((folder / "sae_weights.safetensors").is_file() for folder in train_suite(changed, out, resume=True))


def test_the_dry_run_prints_groups_tokens_and_memory_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "mini/suite", *SMALL, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (group,) = plan["groups"]
    assert group["names"] == list(small().members()) and group["tokens"] == 5120
    assert 0 < group["memory_gb"] < plan["memory_gb"] == 1
    assert main(["train", "mini/gated", "sae.d_sae=128", "train_batch_size_tokens=512", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "400,000 tokens" in text and "SAEs 1, groups 1;" in text
    assert "corpus micro-italiano: its tokens are not counted" in text
    assert "activations at blocks.1.hook_resid_post: BOS norm " in text and "outlier dimensions" in text
    assert set(plan["activations"]) == {hook for spec in small().members().values() for hook in spec.hook_names}
    assert main(["train", "mini/gated", "corpus=nope.jsonl", "--dry-run"]) == 2, "the corpus is looked at too"
    assert not list(tmp_path.iterdir())


def test_the_dry_run_fetches_no_model(capsys, monkeypatch):
    def not_here(*_, fetch, **__):
        assert not fetch
        raise UsageError("it is not on this machine")

    monkeypatch.setattr("sae_italian.training.suite.load_model", not_here)
    assert main(["train", "mini/gated", "--dry-run"]) == 0
    assert "not looked at: it is not on this machine" in capsys.readouterr().out


def test_the_dry_run_reads_the_corpus(jsonl, tmp_path, capsys):
    """Its column, how many tokens it has, and how often the training reads it."""
    words = [f"corpus={jsonl}", "train_batch_size_tokens=512", "--dry-run"]
    assert main(["train", "mini/topk", *words, "text_column=testo"]) == 2 and "'testo'" in capsys.readouterr().err
    assert main(["train", "mini/topk", *words, "training_tokens=1M"]) == 2
    assert "fewer than the 1,000,000 of training_tokens" in capsys.readouterr().err
    assert main(["train", "mini/topk", *words, "training_tokens=1M", "repeat_corpus=true", "--json"]) == 0
    n_tokens, epochs = re.fullmatch(
        rf"corpus {jsonl}: ([0-9,]+) training tokens, ([0-9.]+) epochs", json.loads(capsys.readouterr().out)["corpus"]
    ).groups()
    assert float(epochs) == pytest.approx(1e6 / int(n_tokens.replace(",", "")), abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["memory_gb=0.001"],
            r"L1R-1x alone needs 0\.0\d GB \(saes 0\.00.*more than memory_gb 0\.001.*Raise memory_gb",
        ),
        (["layers=[1, 2, 1]"], "L1R-1x comes twice"),
        (["expansions=[2, 2.0]"], "L1R-2x comes twice"),
        (["layers=[1, 4]"], "L4R-1x: .*layers 0 to 3"),
        (["sites=[R, Q]"], "config key 'sites.1' is 'Q'; it should be 'R', 'A', 'M' or 'TC'"),
        (["sae.architecture=gated", "sae={architecture: gated}"], "site TC: no transcoder.*'gated'"),
        (["hook_name=blocks.1.hook_resid_post"], "'hook_name' is not set in a suite"),
        (["expansion=[2]"], "unknown key 'expansion' in the suite. Did you mean 'expansions'"),
        (["lr=-1"], "config key 'lr'"),
        (["memory_gb=0"], "config key 'memory_gb'"),
        (["sae.k=200"], "below sae.d_sae"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(overrides, message):
    with pytest.raises(UsageError, match=message) as error:
        small(*overrides).groups()
    assert "\n" not in str(error.value)


def test_a_run_is_no_suite_and_a_suite_no_run(tmp_path):
    with pytest.raises(UsageError, match="this config is a suite"):
        load_spec("mini/suite")
    with pytest.raises(UsageError, match="'hook_name' is not set in a suite"):
        load_suite("mini/topk")


def test_groups_trained_side_by_side_are_those_trained_one_by_one(tmp_path, monkeypatch):
    """Two processes, one group each: the same files, and a finished suite is left alone."""
    monkeypatch.setattr(units, "get_context", fresh.spawned)
    one = max(sum(memory_of([spec]).values()) for spec in small().members().values())
    suite = small("expansions=[1]", f"memory_gb={1.2 * one}")
    groups = suite.groups()
    assert len(groups) >= 2
    by_one = train_suite(suite, tmp_path / "one")
    together = train_suite(suite, tmp_path / "two", run_units=partial(map_units, workers=2, folder=tmp_path / "two"))
    assert [folder.name for folder in together] == [folder.name for folder in by_one]
    for alone, beside in zip(by_one, together, strict=True):
        for name, tensor in weights(alone).items():
            assert torch.allclose(tensor, weights(beside)[name], atol=1e-5), (
                "threads may differ, so not to the last bit"
            )


def test_one_sae_takes_no_engine(tmp_path, capsys):
    assert main(["train", "mini/topk", "--workers", "2", "--out", str(tmp_path / "x")]) == 2
    assert "--workers is for suites" in capsys.readouterr().err and not (tmp_path / "x").exists()
