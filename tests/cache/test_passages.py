"""Passages, places and neighbours of one small cache, all of it worked out by hand."""

import re

import numpy as np
import pytest

from sae_italian.base.errors import UsageError
from sae_italian.cache import FeatureCache, passages, stats
from sae_italian.cache.passages import LatentActivations, contents, segment_starts
from sae_italian.cache.shards import run_starts
from sae_italian.corpora.packing import NO_DOCUMENT
from tests.cache.made import made_cache

N = NO_DOCUMENT
# Four windows of eight tokens; in segments of three: 1-3 4-6 7 | 9-11 12-14 15 | 17-18 19-21 22-23 | 24-26 27-29 30-31.
DOCUMENTS = [
    [N, 0, 0, 0, 0, 0, 0, 0],
    [N, 1, 1, 1, 2, 2, 2, 2],
    [N, 2, 2, 3, 3, 3, 3, 3],
    [4, 4, 4, 4, 4, 4, 4, 4],  # a window without a special token
]
TOKENS = [
    [0, 1, 2, 3, 1, 2, 4, 5],  # 1-3 says 1 2 3, 4-6 says 1 2 4
    [0, 5, 2, 3, 6, 6, 6, 1],  # 9-11 says 5 2 3
    [0, 1, 1, 2, 2, 1, 4, 4],
    [1, 2, 3, 3, 3, 3, 5, 6],  # 24-26 says 1 2 3 again
]
FIRES = {  # latent 0 never does
    1: {2: 1.0, 3: 3.0, 5: 2.0, 13: 2.0, 18: 5.0, 19: 1.0},
    2: {3: 9.0, 25: 8.0, 6: 7.0, 10: 6.0},
    3: {24: 1.0, 25: 3.0, 9: 4.0, 31: 2.0},
    4: {8 * window + place: 1 + (8 * window + place) / 32 for window in range(3) for place in range(1, 8)},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> FeatureCache:
    acts = np.zeros((4, 8, 5), dtype=np.float32)
    for latent, fires in FIRES.items():
        for position, value in fires.items():
            acts[position // 8, position % 8, latent] = value
    return made_cache(tmp_path_factory.mktemp("hand") / "c", acts, np.array(DOCUMENTS), np.array(TOKENS), 2)


def test_where_segments_start_and_peak(cache):
    position, value, start = cache.latent(1).peaks(3)
    assert position.tolist() == [18, 3, 5, 13, 19] and value.tolist() == [5, 3, 2, 2, 1]
    assert start.tolist() == [17, 1, 4, 12, 19]
    assert cache.latent(1).position.tolist() == sorted(position.tolist() + [2])
    assert segment_starts(cache, np.array([7, 15, 23, 26, 31]), 3).tolist() == [7, 15, 22, 24, 30]
    assert [part.tolist() for part in cache.latent(0).peaks(3)] == [[], [], []]


def test_what_stands_around_an_anchor_ends_with_its_document_and_window(cache):
    found = cache.latent(1).around(np.array([18, 3, 13, 1, 23]), 2, 2)
    assert found.start.tolist() == [17, 1, 12, 1, 21] and found.length.tolist() == [2, 5, 4, 3, 3]
    assert found.doc.tolist() == [2, 0, 2, 0, 3] and found.anchor.tolist() == [18, 3, 13, 1, 23]
    assert found.maximum.tolist() == [5, 3, 2, 3, 0]
    assert found.show(1).values.tolist() == [0, 1, 3, 0, 2] and found.show(4).values.tolist() == [0, 0, 0]
    assert [len(one.text) for one in found.shown()] == [2, 5, 4, 3, 3]
    lopsided = cache.latent(1).around(np.array([13]), 1, 0)
    assert (lopsided.start.tolist(), lopsided.length.tolist()) == ([12], [2])


def test_passages_that_say_the_same_are_one_and_a_token_more_or_less_is_another(cache):
    said = contents(cache, np.array([1, 24, 4, 9]), 0, 2)
    assert said[0] == said[1] and len(set(said)) == 3  # the last token differs in one, the first in another
    end, start = contents(cache, np.array([15, 18]), 0, 2)  # of a window and of a document: what follows is not theirs
    assert end == start
    found = cache.latent(2).windows("top", 10, width=3)
    assert found.start.tolist() == [1, 4, 9] and found.maximum.tolist() == [9, 7, 6]
    assert found.anchor.tolist() == [3, 6, 10]  # the strongest token, not the first
    assert cache.latent(2).windows("top", 2, width=3).start.tolist() == [1, 4]


def test_text_that_repeats_itself_does_not_hide_the_rest(tmp_path):
    """The forty strongest windows say the same: more of the activations are looked at than the first few."""
    acts, tokens = np.zeros((41, 4, 1), np.float32), np.ones((41, 4), int)
    acts[:40, 1], acts[40, 1], tokens[40] = 2, 1, 2
    repeating = made_cache(tmp_path / "c", acts, np.arange(41)[:, None] + np.zeros((1, 4), int), tokens, 50)
    assert repeating.latent(0).windows("top", 2, width=4).maximum.tolist() == [2, 1]


def test_parts_of_the_maxima_are_drawn_from_in_turn_and_nothing_twice(cache):
    each = cache.latent(2).windows("quantiles", 4, width=3, bins=4)
    assert each.start.tolist() == [1, 4, 9]  # the second part's only segment says what the first's does
    halves = cache.latent(2).windows("quantiles", 4, width=3, bins=2).start.tolist()
    assert halves[0] in (1, 24) and sorted(halves[1:]) == [4, 9]
    uneven = cache.latent(4).windows("quantiles", 4, width=3, bins=3).maximum
    parts = np.array_split(cache.latent(4).peaks(3).value, 3)  # two of the strongest, one of each other part
    assert [int(np.isin(part, uneven).sum()) for part in parts] == [2, 1, 1]


def test_a_seed_draws_the_same_and_none_is_the_seed_nought(cache):
    latent = cache.latent(4)
    draws = [latent.windows("random", 3, width=3, seed=seed).start.tolist() for seed in range(6)]
    assert latent.windows("random", 3, width=3).start.tolist() == draws[0]
    assert len({tuple(draw) for draw in draws}) > 1
    other = LatentActivations(cache, 3, *latent)  # each latent draws its own
    assert [other.windows("random", 3, width=3, seed=seed).start.tolist() for seed in range(6)] != draws
    assert all(set(draw) <= {1, 4, 7, 9, 12, 15, 17, 19, 22} for draw in draws)


def test_silent_passages_hold_no_activation_and_the_same_token_one_of_the_favourites(cache, monkeypatch):
    silent = cache.latent(4).windows("silent", 10, width=3)
    assert sorted(silent.start.tolist()) == [24, 27, 30] and silent.maximum.tolist() == [0, 0, 0]
    same = cache.latent(3).windows("same-token", 10, width=3)  # its tokens: 5 1 2 6; 27-29 and 22-23 have none
    assert sorted(same.start.tolist()) == [1, 4, 7, 12, 15, 17, 19]
    assert len(cache.latent(0).windows("same-token", 10, width=3).start) == 0
    monkeypatch.setattr(passages, "SAME_TOKENS", 1)  # its strongest is 5, of one activation as each of the others
    assert cache.latent(3).windows("same-token", 10, width=3).start.tolist() == [7]
    draws = [np.array([24]), np.array([27, 30])]  # no more than are wanted, however they come
    assert passages._distinct(cache.latent(4), draws, 2, 3, set()) == [24, 27]


def test_first_tokens_are_those_of_a_window_and_those_after_a_special_token(cache):
    """Position 24 begins its window, 9 follows a special token; 25 and 31 do neither."""
    row = cache.latent(3).statistics
    assert row["first_token_share"] == 0.5 and row["n_windows"] == 2 and row["n_documents"] == 2
    assert row["position_profile"] == [0.25, 0.5, 0, 0, 0, 0, 0, 0, 0.25, 0]
    first = cache.latent(1).statistics
    assert (first["n_documents"], first["n_windows"], first["first_token_share"]) == (3, 3, 0)
    assert cache.latent(0).statistics["quantiles"] == [0] * 5  # it never fires
    assert run_starts(np.array([[0, 0, 1], [N, 1, 1]])).tolist() == [[0, 0, 2], [0, 1, 1]]


def test_latents_that_fire_together_are_the_same_in_blocks_of_any_size(cache, monkeypatch):
    """Latent 1 shares its six tokens with latent 4, which has 21, and one with latent 2, which has four."""
    row = cache.latent(1).statistics
    assert row["cofiring_ids"] == [4, 2] and row["cofiring_jaccard"] == pytest.approx([6 / 21, 1 / 9])
    counts, whole_range = cache.statistics["count"], next(cache.entries(0, 4))
    whole = stats.cofiring_neighbours(cache, *whole_range, counts)
    monkeypatch.setattr(stats, "SAMPLE", 21)  # all of each latent's own, a latent at a time
    monkeypatch.setattr(stats, "GATHERED", 1)
    assert whole == stats.cofiring_neighbours(cache, *whole_range, counts)
    monkeypatch.setattr(stats, "SAMPLE", 3)  # evenly spaced: 2 5 18 of latent 1, 1 9 17 of latent 4
    ids, shares = (column.to_pylist() for column in stats.cofiring_neighbours(cache, *whole_range, counts).values())
    assert ids[1] == [4] and ids[4] == [3]
    # one in three of 21 would be 7, but latent 3 fires four times
    assert (shares[1], shares[4]) == (pytest.approx([6 / 21]), pytest.approx([4 / 21]))


def test_of_latents_that_fire_together_as_often_the_lower_number_is_first():
    row, other = np.array([0, 0, 0, 2]), np.array([5, 3, 4, 1])
    order, top, begins = stats._largest_first(row, other, np.array([0.5, 0.5, 0.5, 1]), 3)
    assert other[order][top].tolist() == [3, 4, 5, 1] and begins.tolist() == [0, 3, 3, 4]


def test_a_latents_picture_says_what_its_axes_are(cache):
    said = set(re.findall(r">([^<>]+)</text>", cache.latent(1).plot()))
    assert {"activation", "tokens", "token of the cache"} <= said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kind": 40}, "kind 40 is unknown. Valid: top, quantiles"),
        ({"n": -1}, "n is -1; it must be 0 or more"),
        ({"n": "3"}, "n is '3'; it must be 0 or more, a whole number"),
        ({"width": 0}, "width is 0; it must be 1 or more"),
        ({"kind": "quantiles", "bins": 0}, "bins is 0; it must be 1 or more"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
    ],
)
def test_windows_that_cannot_be(cache, asked, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        cache.latent(1).windows(**asked)


def test_a_width_beyond_the_window_is_the_windows_and_costs_no_more(cache, monkeypatch):
    """It was gathered in full: a million tokens around each of 160 positions took 13 seconds."""
    context, around = cache.manifest.context_size, passages._around
    widest = []

    def counted(cache, anchor, before, after, *names):
        widest.append(before + after + 1)
        return around(cache, anchor, before, after, *names)

    monkeypatch.setattr(passages, "_around", counted)
    for kind in passages.KINDS:
        whole, beyond = (cache.latent(1).windows(kind, 3.0, width=width) for width in (context, 10**6))
        assert whole.start.tolist() == beyond.start.tolist() and whole.length.tolist() == beyond.length.tolist()
    assert max(widest) <= context


@pytest.mark.parametrize("number", ["1", 1.5, None, -1, 10**9, np.float32(1)])
def test_a_latent_or_document_that_cannot_be(cache, number):
    with pytest.raises(UsageError, match="latent .* does not exist: this SAE has latents 0 to 4"):
        cache.latent(number)
    with pytest.raises(UsageError, match="document .* does not exist: this cache has 0 to 4"):
        cache.document(number)
    assert len(cache.latent(np.uint8(1))) == 6
