"""Steering and ablation do to the model what they say: checked against edits made by hand."""

import copy
import json

import numpy as np
import pytest
import torch

from sae_italian.analysis.latent import ablate, repeat_rate, steer, token_text, written_directions
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain
from sae_italian.models.activations import logits_with_replacement, read_activations

PROMPT = "Quando Marta e Luca sono andati al mercato, Marta ha dato un libro a"
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def tokens(mini):
    return mini.tokenizer(PROMPT, return_tensors="pt").input_ids


def by_hand(mini, tokens, direction, strength, n):
    """Write greedily without a cache, special tokens left alone."""
    for _ in range(n):
        keep = ~torch.isin(tokens, torch.tensor(mini.tokenizer.all_special_ids))[..., None]
        logits = logits_with_replacement(mini, tokens, HOOK, lambda x, keep=keep: x + strength * direction * keep)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_what_is_written_is_what_adding_the_direction_gives(mini, topk_sae, tokens):
    direction = written_directions(topk_sae, [7])[0]
    found = steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [3.0, -6.0], 8, unit=0.5)
    assert found.hook_name == HOOK and found.unsteered.strength == 0 and found.unsteered.cost == 0
    for continuation in (found.unsteered, *found.steered):
        written = by_hand(mini, tokens, direction, 0.5 * continuation.strength, 8)
        added = 0.5 * continuation.strength * direction * (tokens != mini.tokenizer.bos_token_id)[..., None]
        edited = logits_with_replacement(mini, tokens, HOOK, lambda x, a=added: x + a)[0, -1].log_softmax(-1)
        clean = mini(tokens).logits[0, -1].log_softmax(-1)
        kl = float((edited.exp() * (edited - clean)).sum().detach())
        assert continuation.divergence == pytest.approx(kl, rel=1e-3, abs=1e-5)
        n = tokens.shape[1]
        assert len(continuation.tokens) == 8
        assert mini.tokenizer.decode(written[0], skip_special_tokens=True).endswith(continuation.text)
        log_p = mini(written).logits[0, n - 1 : -1].log_softmax(-1).gather(-1, written[0, n:, None])
        assert continuation.log_prob == pytest.approx(log_p.mean().item(), abs=1e-4)
        assert continuation.cost == pytest.approx(found.unsteered.log_prob - continuation.log_prob, abs=1e-6)
    assert found.steered[0].text != found.unsteered.text and found.unsteered.divergence == pytest.approx(0, abs=1e-5)
    json.dumps(plain(found))


def test_a_special_token_that_is_written_is_left_alone(mini, topk_sae, tokens, monkeypatch):
    """As the tokens of the prompt are; the model writes one between two documents."""
    bos, direction = mini.tokenizer.bos_token_id, written_directions(topk_sae, [7])[0]
    plainly = by_hand(mini, tokens, direction, 12.0, 6)[0]
    often = plainly[tokens.shape[1] :].mode().values.item()
    monkeypatch.setattr(type(mini.tokenizer), "all_special_ids", property(lambda _: [bos, often]), raising=False)
    written = by_hand(mini, tokens, direction, 12.0, 6)[0]
    assert written.tolist() != plainly.tolist()
    found = steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [12.0], 6).steered[0]
    assert found.tokens == tuple(token_text(mini.tokenizer, written[tokens.shape[1] :].tolist()))


def test_a_row_is_written_as_if_it_were_alone(mini, topk_sae):
    options, state = {"temperature": 1.0, "seed": 3}, torch.random.get_rng_state()
    together = steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [2.0, 4.0], 6, **options)
    alone = steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [4.0], 6, **options)
    assert together.steered[1].tokens == alone.steered[0].tokens and together.unsteered.tokens == alone.unsteered.tokens
    others = [steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [4.0], 6, temperature=1.0, seed=s) for s in (4, 5)]
    assert any(other.unsteered.tokens != alone.unsteered.tokens for other in others)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's own draws go on as they would


def test_text_ends_at_the_eos(mini, topk_sae, monkeypatch):
    before = steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [0.0], 6).unsteered
    stop = mini.tokenizer.convert_tokens_to_ids(mini.tokenizer.tokenize(before.text)[1])
    monkeypatch.setattr(type(mini.tokenizer), "eos_token_id", property(lambda _: stop), raising=False)
    after = steer(mini, mini.tokenizer, topk_sae, PROMPT, 7, [0.0], 6).unsteered
    assert after.tokens == before.tokens[:2]


@pytest.mark.parametrize(
    ("text", "rate"), [((1, 2, 3, 4), 0), ((1, 1, 1, 1, 1), 2 / 3), ((1, 2), 0), ((1, 2, 3, 1, 2, 3), 1 / 4)]
)
def test_repeat_rate(text, rate):
    assert repeat_rate(text) == pytest.approx(rate)


def test_ablation_lowers_only_until_the_latent_is_silent(mini, identity_sae, tokens):
    """With a bias of -b the latent of dimension d is silent from x_d = b on: x_d is set to b, not to 0."""
    sae, dimension, bias = copy.deepcopy(identity_sae), 5, 0.05
    sae.b_enc.data[dimension] = -bias
    x = read_activations(mini, tokens, HOOK)[0]
    found = ablate(mini, mini.tokenizer, sae, PROMPT, dimension, top=5)
    active = [i for i in range(1, len(x)) if x[i, dimension] > bias]
    assert [place.position for place in found.positions] == active and len(active) > 1
    for place in found.positions:
        assert place.silenced and place.amount == pytest.approx(float(x[place.position, dimension]) - bias, rel=1e-3)

        def lower(value, position=place.position):
            value = value.clone()
            value[0, position, dimension] = bias
            return value

        clean = mini(tokens).logits[0, place.position].detach()
        moved = logits_with_replacement(mini, tokens, HOOK, lower)[0, place.position] - clean
        assert place.lowered[0].id == int(moved.argmin()) and place.raised[0].id == int(moved.argmax())
        assert place.lowered[0].logit == pytest.approx(float(moved.min()), abs=1e-3)
        assert place.lowered[0].prob == pytest.approx(float(clean.softmax(-1)[place.lowered[0].id]), abs=1e-6)
        log_p, log_q = clean.log_softmax(-1), (clean + moved).log_softmax(-1)
        assert place.divergence == pytest.approx(
            float((log_p.exp() * (log_p - log_q)).sum().detach()), rel=1e-3, abs=1e-6
        )
        assert len(place.lowered) == 5
    json.dumps(plain(found))


def test_a_latent_of_a_topk_sae_is_silent_after_its_ablation(mini, topk_sae, tokens):
    x = read_activations(mini, tokens, HOOK)[0, 1:]
    latent = int(topk_sae.encode(x).sum(0).argmax())
    found = ablate(mini, mini.tokenizer, topk_sae, PROMPT, latent)
    assert found.positions and found.activations[0] == 0
    for place in found.positions:
        # a little more than the amount: alone, a row is rounded otherwise than in the batch that found it
        edited = x[place.position - 1] - 1.001 * place.amount * written_directions(topk_sae, [latent])[0]
        short = x[place.position - 1] - 0.99 * place.amount * written_directions(topk_sae, [latent])[0]
        assert place.silenced and topk_sae.encode(edited[None])[0, latent] == 0
        assert topk_sae.encode(short[None])[0, latent] > 0


def test_a_latent_that_no_push_silences_says_so(mini, identity_sae):
    """Its decoder points away from its encoder: lowering x along it makes it fire more."""
    sae = copy.deepcopy(identity_sae)
    sae.W_dec.data[5] = -sae.W_dec.data[5]
    found = ablate(mini, mini.tokenizer, sae, PROMPT, 5)
    assert found.positions and not any(place.silenced for place in found.positions)
    assert all(place.amount == pytest.approx(place.activation) for place in found.positions)


def test_a_latent_of_an_sae_in_any_precision_is_ablated(mini, identity_sae):
    expected = ablate(mini, mini.tokenizer, identity_sae, PROMPT, 5).positions
    for dtype in (torch.float64, torch.bfloat16):
        sae = copy.deepcopy(identity_sae).to(dtype)
        sae.dtype = dtype
        found = ablate(mini, mini.tokenizer, sae, PROMPT, 5).positions
        assert [place.amount for place in found] == pytest.approx([place.amount for place in expected], rel=0.02)


def test_a_silent_latent_has_no_positions(mini, identity_sae):
    sae = copy.deepcopy(identity_sae)
    sae.b_enc.data[5] = -1e6
    assert ablate(mini, mini.tokenizer, sae, PROMPT, 5).positions == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((PROMPT, 300, [1.0]), "latents 0 to 299"),
        ((PROMPT, -1, [1.0]), "latents 0 to 299"),
        ((PROMPT, 1.0, [1.0]), "latent is 1.0; expected a whole number, 0 to 299"),
        ((PROMPT, "1", [1.0]), "latent is '1'; expected a whole number"),
        ((PROMPT, 1, []), "at least one finite strength"),
        ((PROMPT, 1, [1.0, float("inf")]), "at least one finite strength"),
        *(((PROMPT, 1, [1.0], 8, unit), "a finite unit") for unit in (float("nan"), float("inf"))),
        ((PROMPT, 1, [1.0], 0), "one new token"),
        (("  ", 1, [1.0]), "prompt is empty"),
        ((PROMPT, 1, [1.0], 10_000), "positions"),
    ],
)
def test_bad_input_is_refused_in_one_line(mini, topk_sae, arguments, said):
    *arguments, unit = arguments if len(arguments) == 5 else (*arguments, 1.0)
    with pytest.raises(UsageError, match=said) as error:
        steer(mini, mini.tokenizer, topk_sae, *arguments, unit=unit)
    assert "\n" not in str(error.value)


def test_as_many_tokens_are_shown_as_are_asked_for(mini, identity_sae):
    few, every = (ablate(mini, mini.tokenizer, identity_sae, PROMPT, 5, top).positions[0] for top in (2, None))
    assert few.raised == every.raised[:2] and len(every.raised) + len(every.lowered) > 0.9 * mini.config.vocab_size
    with pytest.raises(UsageError, match="top is -1; it must be 1 or more"):
        ablate(mini, mini.tokenizer, identity_sae, PROMPT, 5, -1)


def test_strengths_may_be_an_array_or_one_number(mini, topk_sae):
    for strengths, told in ((np.array([1.0, 2.0]), [1.0, 2.0]), (4.0, [4.0]), ("48", [48.0])):  # one text, two digits
        found = steer(mini, mini.tokenizer, topk_sae, PROMPT, 1, strengths, 1)
        assert [each.strength for each in found.steered] == told


def test_an_sae_that_writes_no_fixed_direction_is_refused(mini, topk_sae):
    sae = copy.deepcopy(topk_sae)
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(UsageError, match="normalize_activations"):
        ablate(mini, mini.tokenizer, sae, PROMPT, 1)
