"""Draws: parts share nothing, negatives are silent and as long as their positives, marks are equally many."""

from types import SimpleNamespace

import numpy as np
import torch

from sae_italian.autointerp.draws import MARK_SHARE, ExampleSource, find_neighbours
from sae_italian.autointerp.examples import latent_examples
from sae_italian.cache.read import PARTS
from tests.autointerp.conftest import DEAD, N_PREVIOUS, N_TOKENS

LATENTS = (0, N_TOKENS, N_TOKENS + N_PREVIOUS)


def test_parts_share_no_document_and_no_segment_text(source, planted):
    parts = planted.document_parts()
    seen: dict[int, int] = {}
    for latent in LATENTS:
        activity = source.activity(latent)
        for number, part in enumerate(PARTS):
            draw = source.draw(activity, part, 50)
            assert len(draw.positive) > 5
            for segments in (draw.positive, *draw.negative.values()):
                segments = segments[segments >= 0]
                assert set(parts[source.doc[segments]].tolist()) <= {number}
                for content in source.content[segments].tolist():
                    assert seen.setdefault(content, number) == number


def test_negatives_are_silent_paired_and_as_long(source, planted):
    for latent in LATENTS:
        active = set(planted.latent(latent).position.tolist())
        activity = source.activity(latent)
        draw = source.draw(activity, "test", 50)
        assert {"random", "same-token", "cofiring"} <= set(draw.negative)
        for name in draw.negative:
            positive, negative = draw.pairs(name)
            assert len(positive) == len(negative) == len(set(negative.tolist()))
            assert (source.length[positive] // 4 == source.length[negative] // 4).all()
            assert all(active & set(positions.tolist()) for positions in source.grid(positive))
            assert not any(active & set(positions.tolist()) for positions in source.grid(negative))
            copies = np.isin(source.content, source.content[negative])
            assert not any(active & set(positions.tolist()) for positions in source.grid(np.flatnonzero(copies)))
        assert len(draw.pairs("random")[0]) == len(draw.positive)


def test_same_token_negatives_hold_the_token(source, planted):
    latent = N_TOKENS + N_PREVIOUS  # random positions: every token is silent elsewhere
    activity = source.activity(latent)
    draw = source.draw(activity, "test", 50)
    positive, negative = draw.pairs("same-token")
    assert len(positive) >= 10
    for ours, theirs in zip(source.grid(positive), source.grid(negative), strict=True):
        strongest = ours[source.values(activity, ours[None])[0].argmax()]
        assert source.tokens[strongest] in source.tokens[theirs[theirs >= 0]]
    # a latent on every occurrence of a token has none
    always = source.draw(source.activity(0), "test", 50)
    assert len(always.pairs("same-token")[0]) == 0


def test_neighbours_negatives_show_a_neighbour_at_work(source, planted):
    latent = N_TOKENS
    draw = source.draw(source.activity(latent), "test", 50)
    neighbours = source.neighbours["cofiring"][latent]
    active = set(np.concatenate([planted.latent(int(n)).position for n in neighbours]).tolist())
    _, negative = draw.pairs("cofiring")
    assert len(negative) and all(active & set(positions.tolist()) for positions in source.grid(negative))


def test_neighbours_come_from_the_table_and_directions_from_the_sae_where_the_table_has_none(planted):
    ids = planted.statistics["cofiring_ids"][N_TOKENS]
    found = find_neighbours(planted, [DEAD, N_TOKENS])
    assert found["cofiring"][N_TOKENS].tolist() == list(ids[:5]) and DEAD not in found["cofiring"]
    assert found["decoder"][N_TOKENS].tolist() == list(planted.statistics["decoder_ids"][N_TOKENS][:5])
    statistics = {"cofiring_ids": [[], [0], [], []], "decoder_ids": [[]] * 4}
    directions = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.5, 0.5]])
    unknown, sae = SimpleNamespace(statistics=statistics), SimpleNamespace(W_dec=directions)
    assert find_neighbours(unknown, [0, 2])["decoder"] == {}
    assert find_neighbours(unknown, [0, 2], sae)["decoder"][0].tolist() == [1, 3, 2]


def test_top_decile_and_random_draws(small_cache):
    from sae_italian.cache import FeatureCache

    cache = FeatureCache.open(small_cache)
    source = ExampleSource(cache)
    latent = int(np.argmax(cache.statistics["count"]))
    activity = source.activity(latent)
    mine = activity.active[source.usable_part[activity.active] == 0]
    largest = dict(zip(activity.active.tolist(), activity.maximum.tolist(), strict=True))
    strength = [largest[segment] for segment in mine.tolist()]
    top, decile = source.positives(activity, "train", 10, "top")
    assert [largest[segment] for segment in top.tolist()] == sorted(strength, reverse=True)[:10] and (decile == 9).all()
    drawn, decile = source.positives(activity, "train", 40, "deciles")
    assert np.bincount(decile, minlength=10).tolist() == [4] * 10
    edges = [min(largest[segment] for segment in drawn[decile == tenth].tolist()) for tenth in range(10)]
    assert edges == sorted(edges)
    random, _ = source.positives(activity, "train", 40, "random")
    assert set(random.tolist()) <= set(mine.tolist()) and len(set(random.tolist())) == 40
    larger = 0
    for latent in np.flatnonzero(cache.statistics["count"] > 100)[:20].tolist():
        position, value = cache.latent(latent)
        train = value[source.position_part[position] == 0].max()
        assert latent_examples(source, latent, n_train=4, n_test=0).maximum == train
        larger += value.max() > train
    assert larger  # strengths are scaled by what the explainer may know


def test_draws_repeat_and_depend_on_the_seed(planted):
    draws = []
    for seed in (0, 0, 1):
        source = ExampleSource(planted, seed=seed)
        draws.append(source.draw(source.activity(0), "test", 20))
    assert np.array_equal(draws[0].positive, draws[1].positive)
    assert np.array_equal(draws[0].negative["random"], draws[1].negative["random"])
    assert not np.array_equal(draws[0].negative["random"], draws[2].negative["random"])
    of_each = {source.rng(latent, purpose).random() for latent in (0, 1) for purpose in ("val", "test")}
    assert len(of_each) == 4  # no latent's draws, and no purpose's, are another's


def test_marks_are_equally_many_and_stand_where_they_should(source, planted):
    for latent in LATENTS:
        activity = source.activity(latent)
        draw = source.draw(activity, "test", 50)
        grid = source.grid(draw.positive)
        values = source.values(activity, grid)
        for name, own in source.marked(activity, draw).items():
            rows = own.rows
            assert (own.positive.sum(axis=1) == own.negative.sum(axis=1))[rows].all()
            assert (values[own.positive] > 0).all()
            least = np.where(own.positive, values, np.inf).min(axis=1)
            assert (least >= MARK_SHARE * values.max(axis=1)).all()
            other = grid if name == "silent-token" else source.grid(draw.negative[name])
            assert (other[own.negative & rows[:, None]] >= 0).all()
            assert (source.values(activity, other)[own.negative & rows[:, None]] == 0).all()
    # decoys in a segment with the same token stand on that token first
    latent = N_TOKENS + N_PREVIOUS
    activity = source.activity(latent)
    draw = source.draw(activity, "test", 50)
    own, other = source.marked(activity, draw)["same-token"], source.grid(draw.negative["same-token"])
    ours = source.grid(draw.positive)
    for row in np.flatnonzero(own.rows):
        assert set(source.tokens[ours[row][own.positive[row]]]) & set(source.tokens[other[row][own.negative[row]]])


def test_examples_carry_true_text(source, planted):
    examples = latent_examples(source, 0, n_train=10, n_test=20, promoted=("casa",))
    assert len([e for e in examples.train if e.positive]) == 10 and examples.maximum == 1.0
    for example in (*examples.train, *examples.test, *examples.marked, *examples.simulation):
        document = next(
            planted.document(i).text
            for i in range(planted.n_documents)
            if planted.document(i).doc_id == example.document
        )
        assert example.text in document and len(example.spans) == len(example.tokens) == len(example.activations)
        assert example.positive or (example.activations == 0).all() or example.negatives == "silent-token"
        assert (example.activations > 0).any() or not example.positive
    shown = next(e for e in examples.train if e.positive)
    assert (
        shown.marked_text().count("<<") >= 1 and shown.marked_text().replace("<<", "").replace(">>", "") == shown.text
    )
    assert shown.strengths(examples.maximum).max() == 10
    pairs = {e.pair for e in examples.test if e.positive}
    assert {e.pair for e in examples.test if not e.positive} <= pairs
    counts = {e.pair: int(e.marks.sum()) for e in examples.marked if e.positive}
    assert all(int(e.marks.sum()) == counts[e.pair] for e in examples.marked)
