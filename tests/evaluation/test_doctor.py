"""The doctor on a healthy SAE, and on the same SAE with one fault planted at a time: the right check must fail."""

import copy
import json
import shutil

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file

from sae_italian.cli import main
from sae_italian.evaluation import doctor, evaluate
from sae_italian.evaluation.doctor import examine
from sae_italian.models import load_model
from sae_italian.saes import load_sae, weights_hash
from sae_italian.saes.fit import Fit
from sae_italian.training import load_spec, train


@pytest.fixture(scope="module")
def healthy_folder(tmp_path_factory):
    spec = load_spec(
        "mini/topk.yaml",
        "hook_name=blocks.2.hook_resid_post",
        "training_tokens=61440",
        "sae.d_sae=384",
        "sae.k=16",
        "sae.normalize_activations=none",
        "dead_feature_window=100",
        "train_batch_size_tokens=512",
        "buffer_tokens=4096",
        "store_batch_size_prompts=16",
        "lr=2e-3",
        "lr_warm_up_steps=5",
        "lr_decay_steps=20",
    )
    return train(spec, tmp_path_factory.mktemp("doctor") / "sae")


@pytest.fixture
def sae(healthy_folder):
    return load_sae(healthy_folder)


def report(sae, model, **options):
    return examine(sae, model, "micro-italiano", n_tokens=2048, **options)


def failed(found) -> set[str]:
    return {check.name for check in found.checks if check.status == "fail"}


def test_a_healthy_sae_passes_and_its_figures_are_those_of_the_card(sae, mini):
    before = weights_hash(sae), copy.deepcopy(sae.cfg.to_dict())
    found = report(sae, mini)
    assert not failed(found), found.text()
    assert (weights_hash(sae), sae.cfg.to_dict()) == before  # the repairs were tried on copies
    names = {check.name for check in found.checks}
    assert names >= {
        "l0",
        "explained variance",
        "explained variance u",
        "ce recovered",
        "norm scale",
        "bos",
        "dead latents",
    }
    assert found.check("l0").status == "pass" and "k is 16" in found.check("l0").found
    card = evaluate(sae, mini, "micro-italiano", split="all", n_tokens=2009)  # what 16 windows hold
    assert found.measures["fit"]["explained_variance"] == pytest.approx(card.explained_variance.value, abs=1e-4)
    assert found.measures["fit"]["l0"] == pytest.approx(card.l0.value)
    assert found.measures["losses"]["clean"] == pytest.approx(card.ce_loss.value, rel=1e-3)
    assert found.measures["losses"]["with_sae"] == pytest.approx(card.ce_loss_with_sae.value, rel=1e-3)


@pytest.mark.parametrize("factor", [0.2, 6.0])
def test_activations_scaled_by_a_constant_on_one_side(sae, mini, factor):
    with torch.no_grad():  # the input's scale folded in, the output's not
        sae.W_enc.mul_(factor)
    found = report(sae, mini)
    check = found.check("norm scale")
    assert check.status == "fail" and "W_dec" in check.remedy
    assert found.measures["norm_scale"]["best_output_factor"] == pytest.approx(1 / factor, rel=0.2)


@pytest.fixture(scope="module")
def fitting(healthy_folder, mini):
    """The threshold that the doctor names, and what it finds with none and with that."""
    none = report(to_jumprelu(load_sae(healthy_folder), 0.0), mini)
    threshold = float(none.check("l0").remedy.split(" to ")[1].split()[0])
    return threshold, none, report(to_jumprelu(load_sae(healthy_folder), threshold), mini)


@pytest.mark.parametrize("factor", [0.02, 60.0])
def test_activations_scaled_by_a_constant_on_both_sides(sae, mini, fitting, factor):
    """As if trained on activations `factor` times as large; with a threshold the scale then decides what fires."""
    threshold, _, found = fitting
    assert found.check("norm scale").status == "pass"
    jump = to_jumprelu(sae, threshold)
    jump.fold_activation_norm_scaling_factor(1 / factor)
    found = report(jump, mini)
    check = found.check("norm scale")
    assert check.status == "fail" and "fold_activation_norm_scaling_factor" in check.remedy
    assert found.measures["norm_scale"]["best_factor"] == pytest.approx(factor, rel=0.5)


def test_normalisation_that_was_never_folded_in(sae, mini):
    sae.cfg.normalize_activations = "expected_average_only_in"
    check = report(sae, mini).check("norm scale")
    assert check.status == "fail" and "not folded in" in check.found


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_an_sae_that_scales_each_token_by_itself_is_looked_at_whole(sae, mini, mode):
    fields = {**sae.cfg.to_dict(), "normalize_activations": mode}
    scaling = SAE.from_dict(fields)
    scaling.load_state_dict(sae.state_dict())
    found = report(scaling, mini)
    assert "scaled by itself" in found.check("norm scale").found
    assert found.check("decoder layout").status == "pass" and found.measures["explained_variance_by_layer"]


def test_another_layer(sae, mini):
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    check = report(sae, mini).check("hook and layer")
    assert check.status == "fail" and "blocks.2.hook_resid_post" in check.remedy


def test_a_hook_the_model_does_not_have(sae, mini):
    sae.cfg.metadata.hook_name = "blocks.9.hook_resid_post"
    found = report(sae, mini)
    assert failed(found) == {"hook and layer"} and "layers 0 to 3" in found.check("hook and layer").found


def windows(model, n_bos: int) -> torch.Tensor:
    """Windows of one document each, opened with n_bos BOS tokens."""
    from sae_italian.corpora import iter_documents

    rows = []
    for document in iter_documents("micro-italiano", "heldout"):
        ids = model.tokenizer(document.text, add_special_tokens=False).input_ids
        if len(ids) >= 60:
            rows.append(([model.tokenizer.bos_token_id] * n_bos + ids)[:60])
        if len(rows) == 40:
            return torch.tensor(rows)
    raise AssertionError("MicroItaliano's documents became too short for this test")


@pytest.mark.parametrize(("n_bos", "says"), [(0, "missing"), (2, "doubled")])
def test_windows_without_bos_or_with_two(sae, mini, n_bos, says):
    check = report(sae, mini, tokens=windows(mini, n_bos)).check("bos")
    assert check.status == "fail" and says in check.remedy
    assert report(sae, mini, tokens=windows(mini, 1)).check("bos").status == "pass"


def test_an_sae_that_was_trained_without_bos(sae, mini):
    def statuses(trained_with: bool | None) -> list[str]:
        sae.cfg.metadata.prepend_bos = trained_with
        return [doctor._bos_check(sae, mini, windows(mini, n)).status for n in (0, 1)]

    assert statuses(False) == ["pass", "warn"] and statuses(None) == ["fail", "pass"]  # None: with, as most are


def test_which_model_and_revision_an_sae_was_trained_on(sae):
    def said(trained_on: str, commit: str | None, **facts: str) -> list[tuple[str, str]]:
        sae.cfg.metadata.model_name, sae.cfg.metadata.model_revision = trained_on, commit
        return [(check.name, check.status) for check in doctor._model_checks(sae, facts)]

    for name in ("sae-italian-mini", "mini"):
        assert said(name, "a", name="sae-italian-mini", revision="a") == [("model", "pass")]
    assert said("mini", "a", name="minerva", revision="b") == [("model", "warn"), ("revision", "warn")]
    assert said("mini", None, name="sae-italian-mini", revision="b") == [("model", "pass")]


def test_how_far_from_k_is_too_far(sae):
    sample = doctor.measure.Sample(*4 * [torch.empty(0)])

    def statuses(*l0: float) -> list[str]:
        return [doctor._l0_check(sae, sample, each).status for each in l0]

    assert statuses(16, 13, 19.9, 12, 21, 8.1, 31, 7, 33) == 3 * ["pass"] + 4 * ["warn"] + 2 * ["fail"]
    sae.cfg.k = sae.cfg.metadata.k = None
    assert statuses(0.09 * sae.cfg.d_sae, 0.11 * sae.cfg.d_sae) == ["pass", "fail"]


def test_dead_latents_are_judged_where_enough_was_seen(sae):
    def found(n_tokens: int, dead: float):
        sample = doctor.measure.Sample(*2 * [torch.empty(0)], *2 * [torch.empty(n_tokens, 1)])
        return doctor._dead_check(sae, sample, Fit(1, 1, 16, dead))

    assert [found(1000, dead).status for dead in (0.4, 0.6, 0.95)] == ["pass", "warn", "fail"]
    assert found(400, 0.95).status == "pass" and "too few to judge" in found(400, 0.95).found


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ((1.0, 1.2, 3.0), ["pass", "pass"]),
        ((1.0, 2.0, 3.0), ["pass", "warn"]),
        ((1.0, 2.7, 3.0), ["pass", "fail"]),
        ((1.0, 1.2, 1.005), ["pass", "warn"]),  # to zero it costs nothing: no test of the SAE
        ((3.1, 3.2, 5.0), ["fail", "pass"]),  # ten tokens in equal shares: 2.3 nats
        ((float("nan"), 1.2, 3.0), ["fail", "fail"]),
    ],
)
def test_losses_are_judged(sae, monkeypatch, losses, said):
    tokens = torch.arange(10).repeat(40, 6)
    sums = {name: torch.tensor([each]) for name, each in zip(("ce", "ce_sae", "ce_zero"), losses, strict=True)}
    monkeypatch.setattr(doctor, "measure_windows", lambda *_, **__: ({"n_loss": torch.ones(1), **sums},))
    sample = doctor.measure.Sample(tokens, tokens >= 0, torch.empty(0), torch.empty(0))
    assert [check.status for check in doctor._loss_checks(sae, None, sample, {})] == said


@pytest.mark.parametrize(("template", "says"), [("$A", "missing"), ("<s> <s> $A", "doubled")])
def test_a_tokenizer_that_adds_no_bos_or_two(sae, mini, template, says):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(mini.tokenizer.backend_tokenizer)
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1)])
    model = load_model("mini")
    model.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    check = report(sae, model).check("bos")
    assert check.status == "fail" and says in check.remedy


def test_a_decoder_laid_out_the_other_way(sae, mini):
    with torch.no_grad():  # [d_in, d_sae] numbers read as [d_sae, d_in]
        sae.W_dec.copy_(sae.W_dec.T.contiguous().reshape(sae.W_dec.shape))
    check = report(sae, mini).check("decoder layout")
    assert check.status == "fail" and "transposed" in check.remedy


def test_a_decoder_stored_transposed(healthy_folder, tmp_path, capsys):
    folder = tmp_path / "sae"
    shutil.copytree(healthy_folder, folder)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"W_dec": weights["W_dec"].T.contiguous()}, folder / "sae_weights.safetensors")
    assert main(["saes", "doctor", str(folder)]) == 2
    out = capsys.readouterr()
    assert (
        "W_dec is transposed" in out.out
        and "store W_dec as [d_sae, d_in]" in out.out
        and "checks failed: weights" in out.err
    )


@pytest.fixture
def unfolded(sae):
    """The same SAE with decoder rows of differing norm, which enter the top k: what a training run may hold."""
    norms = torch.exp(torch.randn(sae.cfg.d_sae, generator=torch.Generator().manual_seed(0)) * 0.7)
    sae.cfg.rescale_acts_by_decoder_norm = True
    with torch.no_grad():
        sae.W_dec.mul_(norms[:, None])
        sae.W_enc.div_(norms)
        sae.b_enc.div_(norms)
    return sae, norms


def encoder_times(sae, norms):
    with torch.no_grad():
        sae.W_enc.mul_(norms)
        sae.b_enc.mul_(norms)


def test_a_decoder_norm_folded_once_is_fine_and_twice_is_found(unfolded, mini):
    sae, norms = unfolded
    sae.fold_W_dec_norm()
    sae.cfg.rescale_acts_by_decoder_norm = False
    assert report(sae, mini).check("decoder norm").status == "pass"
    encoder_times(sae, norms)  # the encoder's half of the fold again, the decoder being of unit norm already
    check = report(sae, mini).check("decoder norm")
    assert check.status == "fail" and "folded twice" in check.remedy


def test_a_decoder_norm_folded_twice_on_both_sides(unfolded, mini):
    sae, norms = unfolded
    sae.cfg.rescale_acts_by_decoder_norm = False
    for _ in range(2):
        encoder_times(sae, norms)
        with torch.no_grad():
            sae.W_dec.div_(norms[:, None])
    check = report(sae, mini).check("decoder norm")
    assert check.status == "fail" and "folded twice" in check.remedy


def to_jumprelu(sae, threshold: float):
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(
        d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input
    )
    config.metadata = copy.deepcopy(sae.cfg.metadata)
    config.metadata.k = sae.cfg.k
    jump = JumpReLUSAE(config)
    jump.load_state_dict({**sae.state_dict(), "threshold": torch.full((sae.cfg.d_sae,), threshold)})
    return jump.eval()


def test_a_threshold_missing_after_topk_to_jumprelu(sae, mini, fitting):
    named, none, mended = fitting
    check = none.check("l0")
    assert check.status == "fail" and "no threshold" in check.found
    assert mended.check("l0").status == "pass" and not failed(mended), mended.text()
    low = report(to_jumprelu(sae, named / 1000), mini).check("l0")
    assert low.status == "fail"


def test_the_tokenizer_of_another_model(sae, mini, jsonl):
    from sae_italian.corpora import iter_documents
    from tests.bench.train_mini import train_tokenizer

    model = load_model("mini")
    texts = [document.text[::-1] for document in iter_documents(str(jsonl), "all")]
    model.tokenizer = train_tokenizer(iter(texts), model.config.vocab_size)
    unknown = copy.deepcopy(sae)  # as of another's training: told by the loss
    unknown.cfg.metadata.vocabulary = None
    for each, said in ((sae, "other tokens than"), (unknown, "nats")):
        check = report(each, model).check("tokenizer")
        assert check.status == "fail" and "another model" in check.remedy and said in check.found


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(sae, mini):
    tokens = windows(mini, 1)
    tokens[3, 7] = mini.config.vocab_size  # the first that there is not
    check = report(sae, mini, tokens=tokens).check("tokenizer")
    assert check.status == "fail" and "another model" in check.remedy


def test_a_random_sae_fails_on_what_it_explains(topk_sae, mini):
    found = failed(report(topk_sae, mini))
    assert {"explained variance", "explained variance u"} <= found and "decoder layout" not in found


def test_a_layer_is_named_where_it_fits_clearly_better(sae, monkeypatch):
    def status(here: float, there: float) -> str:
        monkeypatch.setattr(doctor.measure, "fit_by_layer", lambda *_: {0: there, 2: here})
        return doctor._layer_check(sae, None, doctor.measure.Sample(*4 * [torch.empty(0)]), {}).status

    assert [status(-9, -3), status(0.1, 0.12), status(0.1, 0.5)] == ["pass", "pass", "fail"]


def test_a_transcoder(mini):
    """The MLP itself as a transcoder of exactly its own reconstruction: zero latents, output its mean."""
    from sae_lens import Transcoder, TranscoderConfig

    config = TranscoderConfig(d_in=128, d_sae=256, d_out=128, apply_b_dec_to_input=False)
    config.metadata.hook_name, config.metadata.hook_name_out = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
    config.metadata.model_name = "sae-italian-mini"
    config.metadata.context_size = 4096  # more than the model has
    found = report(Transcoder(config).eval(), mini)
    assert found.n_tokens > 1500 and {check.name for check in found.checks} >= {"hook and layer", "norm scale", "l0"}


def test_the_command(healthy_folder, capsys):
    assert main(["saes", "doctor", str(healthy_folder), "--tokens", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] in ("pass", "warn") and {c["name"] for c in found["checks"]} >= {"bos", "l0"}
    assert main(["saes", "list"]) == 0
    out = capsys.readouterr().out
    assert "llama_scope_lxtc_8x" in out and "65536" in out and "Apache-2.0" in out
    assert main(["saes", "doctor", "nothing"]) == 2
