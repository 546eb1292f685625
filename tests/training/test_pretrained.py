"""Training from a published SAE: the same function at the start, the map at the end, what is refused, resume."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from safetensors.torch import load_file

from sae_italian.base.errors import DataError, UsageError
from sae_italian.cli import main
from sae_italian.evaluation.card import read_card
from sae_italian.saes import load_sae
from sae_italian.saes.fit import fit, mean_l0, save_sae
from sae_italian.saes.jumprelu import to_jumprelu
from sae_italian.training import run as run_module
from sae_italian.training import spec_from_dict, train
from sae_italian.training.loop import Loop
from sae_italian.training.pretrained import LATENT_MAP, Origin, latent_map
from tests.models.conftest import use_cache
from tests.models.hub import put_in_cache
from tests.saes.formats import sparsify_weights, write_sparsify


@pytest.fixture(scope="module")
def x(small_spec, mini):
    stream = run_module.open_stream(small_spec, mini, small_spec.hook_name)
    return stream.sample(small_spec.hook_name)


@pytest.fixture
def from_sae(small_spec):
    """The spec of a run that starts from an SAE; words of `sae` are changed, None removes one."""

    def make(path, run=(), **sae):
        kept = {key: value for key, value in (small_spec.sae | sae).items() if value is not None}
        values = small_spec.model_dump() | {"sae": kept, "from_pretrained_path": str(path)}
        return spec_from_dict(values | dict(run))

    return make


def started(spec, x, scale=None):
    sae: Any = TrainingSAE.from_dict(spec.to_saelens().get_training_sae_cfg_dict())
    Origin(spec).start(sae, x, x, scale)
    return sae


@pytest.mark.parametrize("architecture", ["topk", "sparse_topk"])
@pytest.mark.parametrize("reads_bias", [True, False])
@pytest.mark.parametrize("scale", [None, 0.37])
def test_it_computes_what_its_origin_does(from_sae, trained_sae, x, architecture, reads_bias, scale):
    spec = from_sae(trained_sae, architecture=architecture, apply_b_dec_to_input=reads_bias, start="mean")
    sae, origin, s = started(spec, x, scale), load_sae(trained_sae), scale or 1.0
    assert torch.allclose(sae(s * x[:200]) / s, origin(x[:200]), atol=1e-5)
    assert sae.cfg.normalize_activations == spec.sae["normalize_activations"]


def test_a_scale_that_is_not_folded_in_is_that_of_the_text(from_sae, trained_sae, x, tmp_path):
    folded = load_sae(trained_sae)
    scale = x.shape[1] ** 0.5 / x.norm(dim=-1).mean()
    raw = load_sae(trained_sae)
    raw.fold_activation_norm_scaling_factor(1 / scale)
    raw.cfg.normalize_activations = "expected_average_only_in"
    sae = started(from_sae(save_sae(raw, tmp_path / "raw"), normalize_activations="none"), x)
    assert torch.allclose(sae(x[:200]), folded(x[:200]), atol=1e-4)


def test_a_threshold_is_set_or_kept(from_sae, trained_sae, x, tmp_path):
    """A JumpReLU of a TopK fires as often; one of a JumpReLU is that JumpReLU; BatchTopK starts at its own threshold."""
    of_topk = {"k": None, "aux_loss_coefficient": None, "normalize_activations": "none"}
    sae = started(from_sae(trained_sae, architecture="jumprelu", **of_topk), x)
    assert mean_l0(sae, x) == pytest.approx(mean_l0(load_sae(trained_sae), x), rel=0.05)
    jumprelu = save_sae(to_jumprelu(load_sae(trained_sae), x, thresholds="one"), tmp_path / "jumprelu")
    sae = started(from_sae(jumprelu, architecture="jumprelu", **of_topk), x)
    assert torch.allclose(sae(x[:200]), load_sae(jumprelu)(x[:200]), atol=1e-5)
    sae = started(from_sae(jumprelu, architecture="batchtopk", k=5, normalize_activations="none"), x, 0.5)
    scores = sae.encode_with_hidden_pre(0.5 * x)[1]  # times the norm of the decoder
    assert (scores > sae.topk_threshold).sum(-1).float().mean().item() == pytest.approx(5, rel=0.05)


def test_a_release_of_the_hub_in_sparsifys_format(from_sae, x, tmp_path, monkeypatch):
    write_sparsify(tmp_path / "run" / "layers.1", sparsify_weights(x.shape[1], 256), k=8)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": "owner/SAE-italian-mini"}))
    put_in_cache(tmp_path / "hub", "owner/saes", tmp_path / "run")
    use_cache(monkeypatch, tmp_path / "hub")
    name = "owner/saes:layers.1"
    assert torch.allclose(started(from_sae(name), x)(x[:99]), load_sae(name)(x[:99]), atol=1e-4)


@pytest.mark.parametrize(
    ("run", "sae", "named"),
    [
        ({}, {"d_sae": 128}, "d_sae is 256, the config's 128"),
        ({"hook_name": "blocks.2.hook_resid_post"}, {}, "hook is .*blocks.1.*blocks.2"),
        ({}, {"architecture": "gated", "k": None, "aux_loss_coefficient": None}, "architecture is topk.* gated"),
        ({}, {"normalize_activations": "covariance_whitening"}, "normalize_activations is none, the config's cov"),
        ({}, {"architecture": "tied", "k": None, "aux_loss_coefficient": None, "start": None}, "architecture"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(from_sae, trained_sae, tmp_path, run, sae, named):
    with pytest.raises(UsageError, match=named):
        train(from_sae(trained_sae, run, **sae), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(from_sae, trained_sae, tmp_path):
    sae = load_sae(trained_sae)
    sae.cfg.metadata.model_name = "google/gemma-3-270m"
    with pytest.raises(UsageError, match="model is gemma-3-270m, the config's sae-italian-mini"):
        Origin(from_sae(save_sae(sae, tmp_path / "other")))


def test_a_run_from_an_sae_is_killed_resumed_and_told(from_sae, trained_sae, x, tmp_path, monkeypatch, capsys):
    spec = from_sae(trained_sae, {"training_tokens": 10_240})
    whole = train(spec, tmp_path / "whole")
    save, at = Loop.save, []

    def killed(loop):
        save(loop)
        if not at:
            at.append(loop.first.n_tokens)
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "killed")
    assert main(["train", str(tmp_path / "killed"), "--resume"]) == 0
    weights = [load_file(folder / "sae_weights.safetensors") for folder in (whole, tmp_path / "killed")]
    assert at == [5120] and all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    records = [load_sae(folder).cfg.metadata.started_from for folder in (whole, tmp_path / "killed")]
    chance = "nearest_by_chance"  # a product's last bit may hang on where its memory lies
    assert records[0][chance] == pytest.approx(records[1][chance], rel=1e-5)
    assert records[0] == records[1] | {chance: records[0][chance]} and records[0]["sae"] == str(trained_sae)
    before = fit(load_sae(trained_sae), x, x).explained_variance
    assert records[0]["explained_variance_before"] == pytest.approx(before, abs=1e-3)
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert first["metrics/explained_variance"] > before - 0.1
    found = load_file(whole / LATENT_MAP)
    mine, theirs = (torch.nn.functional.normalize(load_sae(f).W_dec, dim=-1) for f in (whole, trained_sae))
    assert torch.allclose(found["cosine"], (mine * theirs).sum(-1), atol=1e-5)
    assert torch.equal(found["nearest"], (mine @ theirs.T).argmax(-1))
    assert main(["evaluate", str(whole), "--tokens", "2000"]) == 0
    card = read_card(whole)
    assert card and card.started_from == records[0]
    assert f"Started from {trained_sae.name}" in capsys.readouterr().out and "Partita da" in card.origin_text("it")


def test_an_origin_that_changed_meanwhile_is_named(from_sae, trained_sae):
    with pytest.raises(DataError, match="holds other weights"):
        Origin(from_sae(trained_sae)).resume({"weights_sha256": "0"})


def test_a_map_of_known_latents():
    """Four axes: one stays, two change places, the last becomes a direction that none of the old ones is near to."""
    old = torch.eye(4, 8)
    found, summary = latent_map(old, 3 * torch.stack([old[0], old[2], old[1], torch.eye(8)[7]]))
    assert found["cosine"].tolist() == [1, 0, 0, 0] and found["nearest"][:3].tolist() == [0, 2, 1]
    assert found["cosine_nearest"].tolist() == [1, 1, 1, 0]
    expected = partial(pytest.approx, abs=1e-6)
    assert (summary["drifted"], summary["moved"], summary["new"]) == (expected(0.75), expected(0.75), expected(0.25))
    assert 0.2 < summary["nearest_by_chance"] < 0.7
