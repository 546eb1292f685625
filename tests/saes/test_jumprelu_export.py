"""TopK to JumpReLU: the same outputs before and after folding, k latents on average, and SAELens' own class."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig

from sae_italian.base.errors import UsageError
from sae_italian.cli import main
from sae_italian.evaluation.diagnosis import held_out_activations
from sae_italian.saes import load_sae
from sae_italian.saes.architectures import TopKTranscoder, TopKTranscoderConfig
from sae_italian.saes.fit import CHUNK, save_sae
from sae_italian.saes.jumprelu import to_jumprelu

K = 12


def topk(rescale: bool, **fields) -> TopKSAE:
    """A TopK SAE whose decoder rows have norms from 0.2 to 3."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=200, k=K, rescale_acts_by_decoder_norm=rescale, **fields))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.b_enc.normal_(std=0.3)
        sae.b_dec.normal_()
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_enc.T, dim=-1) * torch.linspace(0.2, 3, 200)[:, None])
    return sae


def converted(*given: Any, **how: Any) -> tuple[Any, SimpleNamespace]:
    """Return the JumpReLU and what its metadata say of the change."""
    sae = to_jumprelu(*given, **how)
    return sae, SimpleNamespace(**sae.cfg.metadata.jumprelu_export)


def by_hand(sae: TopKSAE, theta: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reconstruction and how many latents fire when those whose TopK score is above theta do."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    scores = pre * sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else pre
    z = pre.relu() * (scores > theta)
    return z @ sae.W_dec + sae.b_dec, (z != 0).sum(-1)


@pytest.mark.parametrize("rescale", [True, False])
def test_the_export_fires_k_on_average_and_says_what_the_weights_said(rescale):
    sae, x = topk(rescale), 2 * torch.randn(20 * CHUNK + 17, 32)
    exported, report = converted(sae, x, thresholds="one")
    assert type(exported).__name__ == "JumpReLUSAE" and exported.cfg.architecture() == "jumprelu"
    checks = torch.arange(len(x)) % 5 == 4
    assert report.n_tokens == (~checks).sum() and report.n_tokens_checked == checks.sum()
    output, fired = by_hand(sae, report.threshold, x)
    assert fired[~checks].sum() == K * report.n_tokens, "exactly k per token on the tokens that set it"
    assert abs(report.l0 - K) < 0.02 * K and report.l0 == pytest.approx(fired[checks].double().mean().item())
    largest = output.abs().max()
    assert (exported(x) - output).abs().max() < 1e-5 * largest
    assert torch.allclose(exported.W_dec.norm(dim=-1), torch.ones(200), atol=1e-6)
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() > 0.5, "the SAE given is left as it was"
    variance = (x[checks] - x[checks].mean(0)).pow(2).sum()
    ev = 1 - (x - output)[checks].pow(2).sum() / variance
    assert report.explained_variance == pytest.approx(ev.item(), abs=1e-4)


def test_with_unit_norms_inside_the_topk_one_threshold_serves_all_latents():
    """Folding leaves the score as the pre-activation: Llama Scope's single scalar."""
    exported, report = converted(topk(True), torch.randn(2000, 32), thresholds="one")
    assert torch.allclose(exported.threshold, torch.full((200,), report.threshold), rtol=1e-5)


def test_an_input_scale_is_folded():
    x = 7 * torch.randn(4000, 32) + 1
    scale = 32**0.5 / x.norm(dim=-1).mean()
    scaled, plain = topk(True, normalize_activations="expected_average_only_in"), topk(True)
    exported = to_jumprelu(scaled, x, thresholds="one")
    other = to_jumprelu(plain, x * scale, thresholds="one")
    assert exported.cfg.normalize_activations == "none"
    assert torch.allclose(exported(x), other(x * scale) / scale, atol=1e-3)


def kept(sae: TopKSAE, x: torch.Tensor, y: torch.Tensor, l0_within: float = 0.02, **given) -> list[Any]:
    """Return which part of TopK's explained variance one threshold, and calibrated ones, keep; then what was exported.

    L0 is k in both.
    """
    made = [converted(sae, x, y, **given, thresholds=how) for how in ("one", "calibrated")]
    assert [report.l0 for _, report in made] == pytest.approx(2 * [sae.cfg.k], rel=l0_within)
    return [*(report.explained_variance / report.explained_variance_before for _, report in made), *made[1]]


def test_calibrated_thresholds_keep_what_one_threshold_loses(trained_sae, mini):
    """On documents that they did not see; decoder directions stay, and SAELens' own class says the same."""
    sae = load_sae(trained_sae)
    x, y, documents = held_out_activations(sae, mini, "micro-italiano", 20_000)
    one, calibrated, exported, report = kept(sae, x, y, 0.08, documents=documents)  # 47 of six registers differ in L0
    assert one < 0.9 < 0.92 < calibrated
    assert report.n_tokens + report.n_tokens_checked == len(x)
    assert torch.cosine_similarity(exported.W_dec, sae.W_dec).min() > 0.9999


@pytest.mark.parametrize("apply", [True, False])
def test_a_threshold_that_differs_by_latent_is_found(apply):
    """Latents of strengths 1 to 30: a bar that one of them passes half the time is never reached by another."""
    torch.manual_seed(3)
    directions = torch.linalg.qr(torch.randn(24, 24))[0]
    on = torch.rand(6000, 24) < 0.125
    on[torch.arange(6000), torch.randint(24, (6000,))] = True
    x = (on * torch.linspace(1, 30, 24) * (1 + 0.1 * torch.randn(6000, 24))) @ directions
    sae = TopKSAE(TopKSAEConfig(d_in=24, d_sae=24, k=4, apply_b_dec_to_input=apply))
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.T)
    one, calibrated, *_ = kept(sae, x, x, 0.05)  # 1,200 tokens check it
    assert calibrated > 0.97 and calibrated >= one


def test_tokens_that_check_the_thresholds_do_not_set_them_and_no_mean_error_is_left():
    torch.manual_seed(4)
    x = torch.randn(1000, 32) + 1
    other = torch.where((torch.arange(1000) % 5 == 4)[:, None], 3 * x, x)  # others to check with
    one, two = (to_jumprelu(topk(True), each) for each in (x, other))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    seen = x[torch.arange(1000) % 5 != 4]
    assert (seen - one(seen)).mean(0).abs().max() < 1e-4


def test_a_transcoder_is_calibrated_to_its_target():
    torch.manual_seed(1)
    transcoder = TopKTranscoder(TopKTranscoderConfig(d_in=32, d_sae=64, d_out=24, k=4, apply_b_dec_to_input=False))
    with torch.no_grad():
        transcoder.W_skip.normal_(std=0.1)
        x = torch.randn(5000, 32) * (0.5 + torch.rand(5000, 1))  # tokens of other norms have other bars
        y = transcoder(x) + 0.05 * torch.randn(5000, 24)
    one, calibrated, *_ = kept(transcoder, x, y, 0.05)
    assert calibrated > one + 0.02


def test_few_positive_latents_give_threshold_zero():
    sae = topk(True)
    with torch.no_grad():
        sae.b_enc.fill_(-30.0)
    exported, report = converted(sae, torch.randn(500, 32))
    assert report.threshold == 0 and report.l0 == pytest.approx(report.l0_before) and report.l0 < K
    assert (exported.encode(torch.randn(9, 32)) >= 0).all()


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_becomes_saelens_own_class(tmp_path, skip):
    torch.manual_seed(1)
    config = TopKTranscoderConfig(d_in=32, d_sae=200, d_out=24, k=K, apply_b_dec_to_input=False)
    transcoder = TopKTranscoder(config)
    with torch.no_grad():
        transcoder.W_skip.normal_(std=0.1 if skip else 0.0)
    x, y = torch.randn(4000, 32), torch.randn(4000, 24)
    exported, report = converted(transcoder, x, y, thresholds="one")
    loaded = SAE.load_from_disk(save_sae(exported, tmp_path / "tc"))
    assert loaded.cfg.architecture() == ("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder")
    assert abs(report.l0 - K) < 0.05 * K
    pre = x @ transcoder.W_enc + transcoder.b_enc
    by_hand = (pre * (pre > report.threshold)) @ transcoder.W_dec + transcoder.b_dec + x @ transcoder.W_skip.T
    assert (loaded(x) - by_hand).abs().max() < 1e-5 * by_hand.abs().max()


def test_others_are_refused_in_one_line(identity_sae, mini, jsonl):
    with pytest.raises(UsageError, match="the heldout split of"):  # 20 of 400 documents
        held_out_activations(identity_sae, mini, str(jsonl), 10_000)
    with pytest.raises(UsageError, match="architecture is 'standard'; only topk") as error:
        to_jumprelu(identity_sae, torch.randn(100, 128))
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="3 tokens are too few"):
        to_jumprelu(topk(True), torch.randn(3, 32))
    with pytest.raises(UsageError, match="of 4 documents; at least 5 are needed"):
        to_jumprelu(topk(True), torch.randn(40, 32), documents=torch.arange(40) // 10)
    for given in ({"documents": torch.arange(39)}, {"y": torch.randn(39, 32)}):
        with pytest.raises(UsageError, match=r"x has 40 rows, y (39|40), documents (39|40); all need as many"):
            to_jumprelu(topk(True), torch.randn(40, 32), **given)
    with pytest.raises(UsageError, match="thresholds 'each' is unknown"):
        to_jumprelu(topk(True), torch.randn(40, 32), thresholds="each")
    with pytest.raises(UsageError, match="normalize_activations is 'layer_norm': .* Use thresholds=one"):
        to_jumprelu(topk(True, normalize_activations="layer_norm"), torch.randn(40, 32))


def test_what_rescales_each_token_takes_one_threshold_for_all():
    x = 50 * torch.randn(4000, 32)
    _, report = converted(topk(False, normalize_activations="layer_norm"), x, thresholds="one")
    assert abs(report.l0 - K) < 0.05 * K
    assert report.explained_variance == pytest.approx(report.explained_variance_before, rel=0.1)


def test_the_command_writes_what_stock_saelens_loads(trained_sae, mini, tmp_path, capsys):
    out = tmp_path / "jumprelu"
    arguments = ["export", str(trained_sae), "--to", "jumprelu", "--out", str(out)]
    assert main([*arguments, "--tokens", "20000", "--json", "thresholds=one"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert abs(report["l0"] - 8) < 0.1 * 8
    assert 0 < report["explained_variance"] < 1
    sae = SAE.load_from_disk(out)
    assert type(sae).__name__ == "JumpReLUSAE" and type(load_sae(out)).__name__ == "JumpReLUSAE"
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.1.hook_resid_post" and metadata.exported_from == "topk" and metadata.k == 8
    assert metadata.jumprelu_export["threshold"] == report["threshold"]
    assert main(arguments) == 2 and "not empty" in capsys.readouterr().err


def test_show_prints_the_configuration(trained_sae, capsys):
    """What the CLiC-it recipe says to look k up with; of a release only the configuration is fetched."""
    assert main(["saes", "show", str(trained_sae), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts)[:4] == ["architecture", "d_in", "d_sae", "k"] and facts["k"] == 8
    assert facts["hook_name"] == "blocks.1.hook_resid_post"
    assert main(["saes", "show", "no/such:layers.1"]) == 2 and capsys.readouterr().err.count("\n") == 1
