"""The card on SAEs whose numbers are known, and against SAELens' own evals on the same tokens."""

import copy
import gc
import json
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.report import plain
from sae_italian.base.statistics import StreamingBootstrap, bootstrap
from sae_italian.corpora import iter_documents, pack
from sae_italian.evaluation import EvaluationCard, evaluate, read_card
from sae_italian.evaluation.evaluate import LatentCounts
from sae_italian.models.activations import logits_with_replacement, read_activations
from sae_italian.saes import load_sae, weights_hash
from sae_italian.saes.baselines import random_twin
from tests.bench.train_mini import Recipe, build_model
from tests.conftest import described

module = sys.modules["sae_italian.evaluation.evaluate"]  # the room has a function of that name


def emptied(sae):
    """A copy whose decoder writes its bias only."""
    twin = copy.deepcopy(sae)
    with torch.no_grad():
        twin.W_dec.zero_()
    return twin


def test_identity(identity_sae, mini):
    card = evaluate(identity_sae, mini, "micro-italiano", n_tokens=1500)
    ones = (
        "explained_variance",
        "explained_variance_uncentred",
        "cossim",
        "l2_ratio",
        "ce_loss_recovered",
        "kl_recovered",
    )
    for key in ones:
        assert getattr(card, key).value == pytest.approx(1, abs=1e-6), key
    for key in ("fvu", "delta_lm_loss", "kl_div_with_sae"):
        assert getattr(card, key).value == pytest.approx(0, abs=1e-5), key
    assert card.l0.value == pytest.approx(mini.config.hidden_size, rel=0.01)
    assert card.ultra_active.value > 0.9 and card.dead.value == 0


def test_a_corpus_that_is_too_short_says_how_much_can_be_asked_for(identity_sae, mini, jsonl):
    with pytest.raises(UsageError, match=r"Ask for fewer \(--tokens \d+\)") as error:
        evaluate(identity_sae, mini, str(jsonl), n_tokens=10**6)
    most = int(re.findall(r"--tokens (\d+)", str(error.value))[0])
    assert evaluate(identity_sae, mini, str(jsonl), n_tokens=most).n_tokens >= most
    assert evaluate(identity_sae, mini, str(jsonl), n_tokens=10**6, at_most=True).n_tokens >= most


def test_zero(identity_sae, mini):
    card = evaluate(emptied(identity_sae), mini, "micro-italiano", n_tokens=1000)
    assert card.explained_variance_uncentred.value == pytest.approx(0, abs=1e-6)
    assert card.explained_variance.value < 0.05  # below 0: it does not even get the mean right
    assert card.fvu.value == pytest.approx(1 - card.explained_variance.value)
    assert card.ce_loss_recovered.value == 0 == card.kl_recovered.value == card.cossim.value == card.l2_ratio.value
    assert card.delta_lm_loss.value == pytest.approx(card.ce_loss_with_ablation.value - card.ce_loss.value)


def test_mean(identity_sae, mini):
    """An SAE that always gives the mean explains no variance."""
    sae, tokens = emptied(identity_sae), first_windows(mini, 16)
    keep = tokens != mini.tokenizer.bos_token_id
    acts = read_activations(mini, tokens, "blocks.2.hook_resid_post")[keep]
    with torch.no_grad():
        sae.b_dec.copy_(acts.mean(0))
    card = evaluate(sae, mini, "micro-italiano", n_tokens=int(keep.sum()))
    assert card.n_tokens == int(keep.sum())
    assert card.explained_variance.value == pytest.approx(0, abs=1e-4)
    assert card.fvu.value == pytest.approx(1, abs=1e-4) and card.l0.value > 0


def first_windows(mini, n: int) -> torch.Tensor:
    block = next(pack(iter_documents("micro-italiano", "heldout"), mini.tokenizer, 128, windows_per_block=n))
    return torch.from_numpy(block.tokens)


def transcoder(mini, d_out: int, hook_out: str, skip: bool):
    """A transcoder whose latents write nothing, with or without a skip connection that copies the input."""
    d_in = mini.config.hidden_size
    if skip:
        sae = SkipTranscoder(SkipTranscoderConfig(d_in=d_in, d_out=d_out, d_sae=8, apply_b_dec_to_input=False))
    else:
        sae = Transcoder(TranscoderConfig(d_in=d_in, d_out=d_out, d_sae=8, apply_b_dec_to_input=False))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        if skip:
            sae.W_skip.copy_(torch.eye(d_in))
    sae.cfg.metadata.hook_name_out = hook_out
    return described(sae, "blocks.1.mlp.hook_in")


def test_a_transcoder_is_measured_and_put_in_place_at_its_output(mini):
    """Reading and writing one site apart: a copy of the input is right only where output and input are the same."""
    d_model = mini.config.hidden_size
    copied = evaluate(transcoder(mini, d_model, "blocks.1.mlp.hook_in", True), mini, "micro-italiano", n_tokens=1000)
    assert copied.explained_variance.value == pytest.approx(1) and copied.delta_lm_loss.value == pytest.approx(
        0, abs=1e-5
    )
    nothing = evaluate(transcoder(mini, d_model, "blocks.1.hook_mlp_out", False), mini, "micro-italiano", n_tokens=1000)
    assert nothing.hook_name == "blocks.1.mlp.hook_in" and nothing.hook_name_out == "blocks.1.hook_mlp_out"
    assert nothing.explained_variance_uncentred.value == 0 == nothing.ce_loss_recovered.value
    tokens = first_windows(mini, 8)
    keep = tokens != mini.tokenizer.bos_token_id
    cut = logits_with_replacement(mini, tokens, "blocks.1.hook_mlp_out", lambda x: torch.where(keep[..., None], 0.0, x))
    loss = torch.nn.functional.cross_entropy(cut[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    by_hand = loss.view(8, -1)[keep[:, :-1]].mean().item()
    card = evaluate(
        transcoder(mini, d_model, "blocks.1.hook_mlp_out", False), mini, "micro-italiano", n_tokens=int(keep.sum())
    )
    assert card.ce_loss_with_sae.value == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        *(({"n_tokens": n}, f"n_tokens is {n}; it must be 1 or more") for n in (0, -5, 2.5)),
        ({"n_tokens": None, "loss_tokens": 5}, "n_tokens is 0"),  # micro-italiano has no end
        *(({"loss_tokens": n}, f"loss_tokens is {n}; it must be 1 or more") for n in (0, -1, 2.5)),
        *(({"context_size": n}, "context_size is .*; it must be 2 or more") for n in (0, 1, 2.5, "5", [])),
    ],
)
def test_a_card_of_no_tokens_is_refused(identity_sae, mini, how, message):
    with pytest.raises(UsageError, match=message):
        evaluate(identity_sae, mini, "micro-italiano", **how)


def test_a_card_is_the_same_whatever_torch_makes_tensors_of(identity_sae, mini):
    cards = [evaluate(identity_sae, mini, "micro-italiano", n_tokens=500)]
    torch.set_default_dtype(torch.float64)
    try:
        cards += [evaluate(identity_sae, mini, "micro-italiano", n_tokens=500)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert cards[0].l0 == cards[1].l0 and cards[0].density == cards[1].density


def test_a_transcoder_of_another_width_is_refused(mini):
    with pytest.raises(UsageError, match="writes 64 dimensions.*128 at blocks.1.hook_mlp_out"):
        evaluate(transcoder(mini, 64, "blocks.1.hook_mlp_out", False), mini, "micro-italiano", n_tokens=100)


def test_numbers_equal_saelens_evals_on_the_same_tokens(trained_sae, mini):
    from sae_lens import ActivationsStore
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    from sae_italian.models import load_model

    sae = load_sae(trained_sae)
    tokens = first_windows(mini, 16)
    card = evaluate(sae, mini, "micro-italiano", n_tokens=int((tokens != mini.tokenizer.bos_token_id).sum()))
    hooked = load_model("sae-italian-mini", "hooked")
    from datasets import Dataset

    store = ActivationsStore.from_sae(
        hooked,
        sae,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        store_batch_size_prompts=16,
        streaming=False,
    )
    config = EvalConfig(
        batch_size_prompts=16,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    theirs, by_latent = run_evals(sae, store, hooked, ActivationScaler(), config, exclude_special_tokens=True)
    preserved, behaviour = theirs["model_performance_preservation"], theirs["model_behavior_preservation"]
    assert card.ce_loss.value == pytest.approx(preserved["ce_loss_without_sae"], rel=1e-4)
    assert card.ce_loss_with_sae.value == pytest.approx(preserved["ce_loss_with_sae"], rel=1e-4)
    # SAELens ablates BOS too, where it does not apply the SAE; ours leaves it, so that a zero SAE recovers exactly 0.
    assert card.ce_loss_with_ablation.value != pytest.approx(preserved["ce_loss_with_ablation"], rel=1e-4)
    assert card.kl_div_with_sae.value == pytest.approx(behaviour["kl_div_with_sae"], rel=1e-3)
    assert card.explained_variance.value == pytest.approx(
        theirs["reconstruction_quality"]["explained_variance"], rel=1e-3
    )
    assert card.l0.value == pytest.approx(theirs["sparsity"]["l0"], rel=1e-4)
    assert card.cossim.value == pytest.approx(theirs["reconstruction_quality"]["cossim"], rel=1e-4)
    assert card.l2_ratio.value == pytest.approx(theirs["shrinkage"]["l2_ratio"], rel=1e-4)
    density = np.array(by_latent["feature_density"])
    assert card.dead.value == pytest.approx((density == 0).mean())
    assert card.ultra_active.value == pytest.approx((density > 0.1).mean())
    counts, edges = np.histogram(np.log10(density[density > 0]), bins=[-6, -2, -1, 0])
    ours = [
        sum(b.share.value for b in card.density if low <= b.lo < high)
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    assert ours == pytest.approx(counts / len(density), abs=0.004)


def test_intervals_hold_the_value_and_shrink_with_more_text(trained_sae, mini):
    sae = load_sae(trained_sae)
    few, many = (evaluate(sae, mini, "micro-italiano", n_tokens=n) for n in (800, 5_000))
    for card in (few, many):
        for name in ("explained_variance", "ce_loss_recovered", "ce_loss"):
            estimate = getattr(card, name)
            assert estimate.lo < estimate.value < estimate.hi
    assert many.ce_loss.hi - many.ce_loss.lo < few.ce_loss.hi - few.ce_loss.lo


def test_the_card_is_saved_and_read_back(trained_sae, mini, tmp_path):
    card = evaluate(load_sae(trained_sae), mini, "micro-italiano", n_tokens=2000)
    card.save(tmp_path)
    assert json.loads((tmp_path / "card.json").read_text())["l0"]["value"] == 8
    text = (tmp_path / "card.md").read_text()
    assert "| Explained variance, centred (SAELens) | 0." in text and "`explained_variance_uncentred`" in text
    assert f"| Dead latents in 100,000 tokens | - | only {card.n_tokens:,} tokens seen |" in text
    assert "Losses and KL on" not in text
    assert (tmp_path / "density.svg").read_text().count("<path") > 20
    again = read_card(tmp_path)
    assert again is not None and again.markdown() == card.markdown() and plain(again) == plain(card)
    assert EvaluationCard.from_dict(plain(card)).explained_variance == card.explained_variance
    for damaged in ({}, plain(card) | {"started_from": {"sae": "x"}}):  # of whose latents nothing is said
        (tmp_path / "card.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match="sae-italian evaluate"):
            read_card(tmp_path)
    assert read_card(tmp_path / "nowhere") is None


def test_losses_on_the_first_tokens_only(trained_sae, mini):
    sae = load_sae(trained_sae)
    short = evaluate(sae, mini, "micro-italiano", n_tokens=1000)
    long = evaluate(sae, mini, "micro-italiano", n_tokens=4000, loss_tokens=short.n_loss_tokens)
    assert long.n_loss_tokens == short.n_tokens < long.n_tokens
    assert f"Losses and KL on the first {short.n_tokens:,}." in long.markdown()
    assert long.ce_loss == short.ce_loss and long.kl_recovered == short.kl_recovered
    assert long.explained_variance != short.explained_variance


def test_dead_in_exactly_so_many_tokens():
    """Latent 0 fires always, 1 on token 99,999, 2 on token 100,000, 3 never; counted from 0."""
    counts = LatentCounts(4)
    active = torch.zeros(120_000, 4, dtype=torch.bool)
    active[:, 0] = active[99_999, 1] = active[100_000, 2] = True
    for first in range(0, 120_000, 7_000):
        part = active[first : first + 7_000]
        counts.add(np.arange(first, first + len(part)) // 50, part)
    found = counts.estimates()
    assert found["dead_in_100k"].value == 0.5 and found["dead"].value == 0.25 and found["ultra_active"].value == 0.25
    assert found["dead_in_1m"].value != found["dead_in_1m"].value  # not measured
    assert counts.n_tokens == 120_000
    assert sum(b.share.value for b in counts.density()) == 1 - found["dead"].value


def test_the_interval_of_dead_latents_holds_what_other_documents_give():
    """2,000 latents, each firing in one document of 400 with its own chance: half of the samples' dead shares are in."""
    rng = np.random.default_rng(0)
    chance = 10 ** rng.uniform(-4, -1, 2000)

    def sample() -> LatentCounts:
        counts = LatentCounts(2000)
        counts.add(np.arange(400), torch.from_numpy(rng.random((400, 2000)) < chance))
        return counts

    one, others = sample().dead(), [sample().dead().value for _ in range(40)]
    assert one.lo < one.value < one.hi and 0.005 < one.hi - one.lo < 0.1
    # Two samples differ by sqrt(2) times the error of one: about 83 % of the others lie within the interval.
    assert np.mean([one.lo < other < one.hi for other in others]) > 0.6


def test_the_streaming_intervals_are_those_of_the_bootstrap(trained_sae, mini):
    from sae_italian.base.statistics import StreamingBootstrap

    rng = np.random.default_rng(0)
    sums = rng.gamma(2.0, size=(300, 2))
    whole = bootstrap(sums, lambda s: s[:, 0] / s[:, 1])
    stream = StreamingBootstrap(2)
    for half in (sums / 3, 2 * sums / 3):  # every document arrives in two parts
        for first in range(0, 300, 7):
            stream.add_sums(np.arange(first, min(first + 7, 300)), half[first : first + 7])
    streamed = stream.estimate(lambda s: s[:, 0] / s[:, 1])
    assert streamed.value == pytest.approx(whole.value)
    assert streamed.lo == pytest.approx(whole.lo, rel=0.02) and streamed.hi == pytest.approx(whole.hi, rel=0.02)


def growth(sae, mini, n_batches: int) -> tuple[int, int]:
    """Return the Python heap's size half way and at the end of an evaluation of so many batches."""
    sizes, measure = [], module.measure

    def traced(*arguments, **options):
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
        return measure(*arguments, **options)

    module.measure = traced
    gc.collect()
    gc.freeze()  # what was there before is not searched for garbage again at every batch
    tracemalloc.start()
    try:
        evaluate(sae, mini, "micro-italiano", n_tokens=n_batches * 60 - 60, context_size=64, loss_tokens=1)
    finally:
        tracemalloc.stop()
        gc.unfreeze()
        module.measure = measure
    return sizes[len(sizes) // 2], sizes[-1]


def test_memory_is_flat(topk_sae, mini, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 64)
    half, end = growth(topk_sae, mini, 24)
    assert end - half < 200_000


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_batches(topk_sae, mini, monkeypatch):
    """Of 2,000 tokens in all their parts, losses too; the process' memory as the system counts it."""
    sizes, measure = [], module.measure

    def sampled(*arguments, **options):
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
        return measure(*arguments, **options)

    monkeypatch.setattr(module, "measure", sampled)
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 256)
    card = evaluate(topk_sae, mini, "micro-italiano", n_tokens=260_000)
    assert len(sizes) >= 1000 and card.dead_in_100k.value == card.dead_in_100k.value
    assert max(sizes[-100:]) - max(sizes[100:200]) < 30e6


def test_an_sae_of_another_width_is_refused(topk_sae):
    import types

    other = build_model(Recipe(d_model=64, n_heads=2, d_mlp=64, vocab_size=300)).eval()
    other.tokenizer = types.SimpleNamespace()
    with pytest.raises(UsageError, match="d_in.*the model has 64.*sae-italian-mini"):
        evaluate(topk_sae, other, "micro-italiano", n_tokens=100)


def test_a_corpus_too_short_for_the_tokens_asked(topk_sae, mini, jsonl, tmp_path):
    short = tmp_path / "short.jsonl"
    short.write_text("".join(jsonl.read_text(encoding="utf-8").splitlines(keepends=True)[:20]), encoding="utf-8")
    with pytest.raises(UsageError, match="has about .* fewer than the 9,000,000"):
        evaluate(topk_sae, mini, str(short), split="all", n_tokens=9_000_000)
    short.write_text('{"text": "Il sole."}')
    for at_most in (True, False):
        with pytest.raises(UsageError, match=r"short.jsonl' fills no window of 128 tokens. Use more text or a smaller"):
            evaluate(topk_sae, mini, str(short), split="all", n_tokens=100, at_most=at_most)


def test_a_context_longer_than_the_models(topk_sae, mini):
    with pytest.raises(UsageError, match="512 positions"):
        evaluate(topk_sae, mini, "micro-italiano", n_tokens=100, context_size=1000)


def test_a_random_twin_is_another_sae_of_the_same_kind(topk_sae):
    before = weights_hash(topk_sae)
    twin = random_twin(topk_sae, seed=1)
    assert type(twin) is type(topk_sae) and twin.cfg.k == topk_sae.cfg.k
    assert weights_hash(twin) != before == weights_hash(topk_sae)
    assert weights_hash(random_twin(topk_sae, seed=1)) == weights_hash(twin)
    assert torch.allclose(twin.W_dec.norm(dim=-1), torch.ones(topk_sae.cfg.d_sae))


def test_losses_are_those_of_whole_logits_however_they_are_cut(trained_sae, mini, monkeypatch):
    """A few rows at a time, a window at a time: as from whole copies of the logits, to 1e-6."""
    sae, tokens = load_sae(trained_sae), first_windows(mini, 6)
    keep = tokens != mini.tokenizer.bos_token_id
    windows = module.Windows(tokens, keep, np.zeros(int(keep.sum()), int))
    hook = "blocks.1.hook_resid_post"
    whole, *_ = module.measure(sae, mini, hook, hook, windows, with_loss=True)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(module, "LOGITS_IN_A_SOFTMAX", 7 * mini.config.vocab_size)
    cut, *_ = module.measure(sae, mini, hook, hook, windows, with_loss=True)
    assert all(np.allclose(cut[name], values, rtol=1e-5, atol=2e-6) for name, values in whole.items())

    with torch.no_grad():
        y_hat = sae(read_activations(mini, tokens, hook)[keep])
        log_p = mini(tokens).logits.double().log_softmax(-1)
        log_q = (
            logits_with_replacement(mini, tokens, hook, lambda x: x.masked_scatter(keep[..., None], y_hat))
            .double()
            .log_softmax(-1)
        )
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[keep]
    loss = -log_q[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    assert cut["kl_sae"].sum() == pytest.approx(float(kl.sum()), rel=1e-5)
    assert cut["ce_sae"].sum() == pytest.approx(float(loss[keep[:, :-1]].sum()), rel=1e-6)
    assert cut["n_loss"].sum() == keep[:, :-1].sum() and cut["n_kl"].sum() == keep.sum()


def test_one_dimension_of_great_variance_does_not_hide_the_others():
    """Dimension 0 has a million times the variance and is right, three others are half right, the last is constant."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(4000, 5)) * [1000, 1, 1, 1, 0] + 7
    error = (y - y.mean(0)) * [0, 0.5**0.5, 0.5**0.5, 0.5**0.5, 0]
    sums = StreamingBootstrap(16, n_samples=200)
    for first in range(0, 4000, 500):
        here = slice(first, first + 500)
        columns = [np.ones(500), y[here], y[here] ** 2, error[here] ** 2]
        sums.add_sums(*module.by_document(np.arange(first, first + 500) // 50, columns))
    found = sums.estimate(module.explained_per_dimension)
    assert found.value == pytest.approx((1 + 3 * 0.5) / 4) and found.lo <= found.hi
    assert 1 - (error**2).sum() / ((y - y.mean(0)) ** 2).sum() > 0.999


def test_the_card_names_what_stands_out(mini):
    from sae_italian.evaluation.card import outliers_of

    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(4, 64, 32, generator=generator) + 3
    acts[..., 5] *= 40
    tokens = torch.full((4, 64), 50)
    tokens[:, 0] = mini.tokenizer.bos_token_id
    acts[..., 6] *= 8
    acts[:, 0], acts[2, 7], tokens[2, 7] = 1000, 300, 60
    acts[3, 0] = 500  # a token is told of by its largest norm
    keep = tokens != mini.tokenizer.bos_token_id
    found = outliers_of(acts, tokens, keep, mini.tokenizer)
    assert [outlier.name for outlier in found.tokens] == mini.tokenizer.convert_ids_to_tokens([int(tokens[0, 0]), 60])
    assert found.bos_norm == pytest.approx(1000 * 32**0.5)
    assert found.tokens[0].times == pytest.approx(found.bos_norm / found.median_norm)
    assert [outlier.name for outlier in found.dimensions] == ["5", "6"] and found.dimensions[0].times > 100
    assert "outlier dimensions 5 " in found.text() and "BOS norm 5,657" in found.text()
    calm = outliers_of(torch.randn(4, 64, 32, generator=generator), tokens, keep, mini.tokenizer)
    assert calm.tokens == () == calm.dimensions and calm.text().endswith("outlier dimensions none")


def test_a_card_of_before_opens_without_what_it_lacks(trained_sae, mini):
    card = evaluate(load_sae(trained_sae), mini, "micro-italiano", n_tokens=500)
    assert card.outliers is not None and card.outliers.median_norm > 0
    values = plain(card)
    assert EvaluationCard.from_dict(values).outliers == card.outliers
    del values["outliers"], values["explained_variance_per_dimension"]
    earlier = EvaluationCard.from_dict(values)
    assert earlier.outliers is None and earlier.l0 == card.l0
    assert "| Explained variance, mean over dimensions | - |" in earlier.markdown()
