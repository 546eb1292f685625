"""In float32 several processes agree with one to rounding, until a token's two next latents are nearly equal: then not."""

import torch

from sae_italian.training.loop import SAERun
from sae_italian.training.processes import joined
from tests.training.forked import together

HOOK, STEPS, AFTER = "blocks.1.hook_resid_post", 6, 4


def stepped(spec, model, batches, out) -> list:
    """Return, after each step, the weights, and which latents each of this process' tokens has kept in it."""
    with joined(spec) as processes:
        run, found = SAERun(spec, model, out, processes), []
        for batch in batches:
            run.step({HOOK: batch})
            kept = run.output.feature_acts.to_dense().bool()
            found.append(({name: w.detach().numpy().copy() for name, w in run.sae.state_dict().items()}, kept.numpy()))
        return found


def scores(weights, x):
    w = {name: torch.from_numpy(tensor) for name, tensor in weights.items()}
    return (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]


def near_ties(weights, rows, k):
    """Return each row moved, by bisection towards another one, to where its k-th and its next latent all but agree."""

    def kept(x):
        return torch.zeros(len(x), weights["b_enc"].size).bool().scatter_(1, scores(weights, x).topk(k).indices, True)

    a, b = rows, rows.roll(1, 0)
    own = kept(a)
    for _ in range(40):  # until no float32 lies between
        middle = (a + b) / 2
        same = (kept(middle) == own).all(1, keepdim=True)
        a, b = torch.where(same, middle, a), torch.where(same, b, middle)
    return a


def apart(one, other):
    """Return the largest difference of two SAEs' weights, in parts of the largest weight of its matrix."""
    return max(float(abs(one[name] - other[name]).max() / max(abs(one[name]).max(), 1e-3)) for name in one)


def flipped(one, *parts):
    """Return how many tokens have kept other latents in one process than in several."""
    several = torch.cat([torch.from_numpy(part) for part in parts])
    return int((torch.from_numpy(one) != several).any(1).sum())


def test_float32_agrees_to_rounding_until_a_near_tie_flips(small_spec, mini, tmp_path):
    sae = {"architecture": "sparse_topk", "d_sae": 256, "k": 8, "rescale_acts_by_decoder_norm": False}
    few = {"train_batch_size_tokens": 64, "training_tokens": 64 * (STEPS + AFTER), "dead_feature_window": 100}
    spec = small_spec.model_copy(update={"sae": sae, **few, "lr_warm_up_steps": 0, "lr_decay_steps": 0})
    torch.manual_seed(0)
    rows = torch.randn(STEPS + AFTER, 64, mini.config.hidden_size)

    def run(n, batches):
        return together(n, stepped, spec, mini, batches, tmp_path)

    (alone,), parts = run(1, rows), run(2, rows)
    assert [flipped(one[1], *(part[i][1] for part in parts)) for i, one in enumerate(alone)] == [0] * len(rows)
    far = [apart(one[0], part[0]) for one, part in zip(alone, parts[0], strict=True)]
    assert 0 < max(far) < 1e-5, far  # some numbers differ, none by more than rounding: processors sum in other orders
    ties = rows.clone()
    ties[STEPS] = near_ties(alone[STEPS - 1][0], rows[STEPS], 8)
    (alone,), parts = run(1, ties), run(2, ties)
    flips = [flipped(one[1], *(part[i][1] for part in parts)) for i, one in enumerate(alone)]
    far = [apart(one[0], part[0]) for one, part in zip(alone, parts[0], strict=True)]
    assert flips[:STEPS] == [0] * STEPS and max(far[:STEPS]) < 1e-5
    assert flips[STEPS] > 0 and min(far[STEPS:]) > 1e-2, (flips, far)
    last = [part[-1][0] for part in parts]
    assert apart(*last) == 0  # the processes themselves agree to the bit
