"""Rules by hand: words put together from pieces, families, the trie, the tree, and what their texts say."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sae_italian.autointerp.choose import (
    FAMILIES,
    RuleExplainer,
    _keep_the_rest,
    best_threshold,
    fit_keys,
    fit_tree,
    fit_trie,
    in_order_of_gain,
)
from sae_italian.autointerp.draws import Activity
from sae_italian.autointerp.examples import RuleJudge, latent_examples
from sae_italian.autointerp.morphology import enclitic
from sae_italian.autointerp.places import Places, View, piece_bytes, piece_texts, shape_of
from sae_italian.autointerp.rules import Counts, KeyRule, Path, Tally, TreeRule, TrieRule, rule_of
from sae_italian.autointerp.scorers.budget import BUDGETS
from sae_italian.autointerp.store import Store
from sae_italian.autointerp.wording import (
    displayed,
    explanation_of,
    fits,
    quoted,
    statement,
)
from sae_italian.base.report import plain
from tests.autointerp.conftest import N_PREVIOUS, N_TOKENS
from tests.autointerp.reading import fires, meaning, read, same
from tests.corpora.test_packing import TOKENIZERS


def a_rule(family, names, mass, active=10, total=10, **others) -> KeyRule:
    n = len(names)
    return KeyRule(
        family=family,
        keys=others.pop("keys", np.arange(n)),
        names=names,
        rates=np.full(n, active / total),
        weights=np.ones(n),
        mass=np.asarray(mass),
        active=np.full(n, float(active)),
        total=np.full(n, total),
        n_active=100,
        base=0.01,
        **others,
    )


# --- places ----------------------------------------------------------------------------------------------------------


def test_words_are_those_of_the_text(places, source, planted):
    """At the last piece of a word, the word so far is the word as it stands in the document."""
    rng = np.random.default_rng(0)
    checked = 0
    for position in rng.choice(np.flatnonzero(source.segment_of >= 0), 400, replace=False).tolist():
        form = places.form[position]
        begins = int(places.start_of_word[position])
        if not places.form_ends[form] or (planted.doc[begins] == planted.doc[begins - 2] and not source.linked[begins]):
            continue  # inside a word, or in one that a window's edge cuts
        word = places.words[places.form_word[form]]
        text = planted.document(int(planted.doc[position])).text
        end = int(planted.whole("end")[position])
        assert text[:end].rstrip().endswith(word), (word, text[max(0, end - 20) : end])
        before = text[: len(text[:end].rstrip()) - len(word)]
        assert not word[0].isalnum() or not before[-1:].isalnum(), (word, before[-10:])
        checked += 1
    assert checked > 200


def test_keys_follow_the_position_before_in_the_same_document_only(places, source, planted):
    first = source.start[:50]
    starts = first[planted.doc[first] != planted.doc[first - 1]]
    assert (View(places, starts[:, None]).keys("previous") == -1).all()
    inside = source.start[source.length > 3][:50] + 2
    view = View(places, inside[:, None])
    assert (view.keys("previous")[:, 0] == source.tokens[inside - 1]).all()
    assert (view.keys("token")[:, 0] == source.tokens[inside]).all()
    assert (View(places, np.array([[-1]])).keys("bigram") == -1).all()
    same = view.keys("bigram")[:, 0]
    for a in range(len(inside)):
        for b in range(len(inside)):
            equal = tuple(source.tokens[inside[a] - 1 : inside[a] + 1]) == tuple(
                source.tokens[inside[b] - 1 : inside[b] + 1]
            )
            assert (same[a] == same[b]) == equal


def test_totals_count_every_training_occurrence_once(places, source):
    train = np.flatnonzero(source.position_part == 0)
    for family in FAMILIES:
        keys = View(places, train[:, None]).keys(family)[:, 0]
        expected = np.bincount(keys[keys >= 0], minlength=len(places.totals[family]))
        assert places.totals[family].tolist() == expected.tolist(), family


def test_what_is_fitted_to_are_training_documents_alone(places, source):
    activity = source.activity(N_TOKENS)
    train = source.position_part[activity.position] == 0
    counts = Counts(places, activity)
    assert counts.n == train.sum() < len(train) and counts.position.tolist() == activity.position[train].tolist()


def test_log_odds_by_hand():
    """Of 1,000 tokens 100 are active. The prior is 20 in a thousand of a key's occurrences, half a one at least."""
    counts = SimpleNamespace(n=100, n_tokens=1000, places=SimpleNamespace(train_positions=range(1000)))
    tally = Tally(np.arange(2), np.array([30.0, 2.0]), np.zeros(2), np.array([40, 2]))
    often = np.log(30.8 / (120 - 30.8)) - np.log(10.8 / (920 - 10.8))
    rare = np.log(2.5 / (120 - 2.5)) - np.log(0.5 / (920 - 0.5))
    expected = often / np.sqrt(1 / 30.8 + 1 / 10.8), rare / np.sqrt(1 / 2.5 + 1 / 0.5)
    assert Counts.log_odds(counts, tally) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]


def test_pairs_of_very_many_activations_are_counted_on_a_sample(places, source, monkeypatch):
    counts = Counts(places, source.activity(N_TOKENS))
    whole = counts.keys("bigram")
    monkeypatch.setattr("sae_italian.autointerp.rules.CHAIN_SAMPLE", -(-counts.n // 3))  # every third
    some = Counts(places, source.activity(N_TOKENS)).keys("bigram")
    assert len(some.keys) < len(whole.keys) and (some.active <= some.total).all()
    assert some.mass.sum() == pytest.approx(whole.mass.sum(), rel=0.2)
    # a token that always fires, on which a sample saw its pairs fire less often: its rest fires always, not more
    token = Tally(np.array([7]), np.array([100.0]), np.array([100.0]), np.array([100]))
    _keep_the_rest(token, Tally(np.arange(2), np.array([30.0, 10.0]), np.ones(2), np.array([40, 20])), np.zeros(2, int))
    assert (token.active.tolist(), token.total.tolist(), token.mass.tolist()) == ([40], [40], [98])


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_pieces_add_up_to_the_text(name):
    tokenizer = TOKENIZERS[name]
    text = "perché la città è bella, l'università no"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = piece_bytes(tokenizer, len(tokenizer))
    assert b"".join(pieces[i] for i in ids).decode("utf-8").strip() == text
    assert len(piece_texts(tokenizer, len(tokenizer))) == len(tokenizer)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_words_are_the_same_however_the_text_writes_them(name):
    """Signs and marks that are several pieces, a byte each: they part words, elide or belong to a letter as whole ones do."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(
        "l’amico\u00a0dell’“università”… è perche\u0301 so\u00adno, città", add_special_tokens=False
    )
    linked = np.arange(len(tokens)) > 0
    places = Places(SimpleNamespace(vocab=len(tokenizer), tokens=np.array(tokens), linked=linked), tokenizer)
    ends = places.form_ends[places.form[:-1]]
    words = [places.words[word] for word in places.form_word[places.form[:-1]][ends]]
    assert " ".join(filter(None, words)) == "l’ amico dell’ “ università ” … è perché sono , città"


@pytest.mark.parametrize(
    ("word", "shape"),
    [
        ("1984", "number"),
        ("NATO", "all capitals"),
        ("Roma", "capital"),
        ("dell'", "elided"),
        ("perché", "accented ending"),
        ("...", "punctuation"),
        ("casa", "lower case"),
        ("", "inside a word"),
        ("È", "capital"),
    ],
)
def test_shapes(word, shape):
    assert shape_of(word) == shape


@pytest.mark.parametrize(
    ("word", "pronoun"),
    [
        ("vederlo", "lo"),
        ("dandoglielo", "glielo"),
        ("alzarsi", "si"),
        ("parlarne", "ne"),
        ("vedendola", "la"),
        ("farlo", "lo"),
        ("vistolo", None),
        *(
            (word, None)
            for word in [
                "titolo",
                "capitale",
                "natale",
                "digitale",
                "merci",
                "carne",
                "diversi",
                "parti",
                "parla",
                "certi",
            ]
        ),
        ("casa", None),
    ],
)
def test_enclitics(word, pronoun):
    assert enclitic(word) == pronoun


# --- the quick ways beside the plain ones ------------------------------------------------------------------------------


def test_a_key_is_looked_up_as_in_a_dictionary_and_nothing_is_left_behind(places, source):
    view = View(places, source.grid(np.arange(20)))
    rng = np.random.default_rng(0)
    for family in (*FAMILIES, "trigram"):
        grid = view.keys(family)
        there = np.unique(grid[grid >= 0])
        for _ in range(2):  # the second time other keys: the first ones must be forgotten
            keys = np.sort(rng.permutation(there)[:3])
            known = dict(zip(keys.tolist(), (values := rng.random(len(keys))).tolist(), strict=True))
            found = view.look_up(family, keys, values)
            assert found.ravel().tolist() == [known.get(key, 0.0) for key in grid.ravel().tolist()]


def test_activations_on_a_grid_are_those_of_the_cache(source, planted):
    latent = int(np.argmax(planted.statistics["count"]))
    activity = source.activity(latent)
    position, value = planted.latent(latent)
    known = dict(zip(position.tolist(), value.tolist(), strict=True))
    grid = source.grid(np.array([*activity.active[:40].tolist(), -1, *range(20)]))
    assert source.values(activity, grid).ravel().tolist() == [known.get(p, 0.0) for p in grid.ravel().tolist()]
    assert source.values(activity, grid).sum() > 0


# --- fitting ---------------------------------------------------------------------------------------------------------


def test_an_ending_is_found_as_an_ending(places, source, planted):
    """A latent on every word in -ato is explained by that ending, with every such word, seen in training or not."""
    table = places.tables["suffix3"]
    keys = View(places, np.arange(len(source.tokens))[:, None]).keys("suffix3")[:, 0]
    key = table.names.index("ato")
    position = np.flatnonzero((keys == key) & (source.segment_of >= 0))
    activity = planted_activity(source, position)
    rule, lookup, *_ = RuleExplainer(places, 40).rules(activity)
    assert rule.family.startswith("suffix") and "in -" in statement(rule, "it") and rule.figures()["precision"] > 0.9
    assert "at the end of words in -" in statement(rule, "en")
    assert lookup.family == "token" and plain(rule_of(plain(rule))) == plain(rule)


def planted_activity(source, position, value=None):
    active = np.unique(source.segment_of[position].astype(np.int64))
    value = np.ones(len(position)) if value is None else value
    return Activity(0, position, value, active, np.ones(len(active)))


def test_the_trie_tells_a_token_in_one_context_from_the_token(places, source):
    """Fires on a token only after one other token: the pair is a node, the token's rest is left without."""
    train = np.flatnonzero((source.position_part == 0) & source.linked)
    pairs, counts = np.unique(places.chains["bigram"][train], return_counts=True)
    common = pairs[np.argsort(-counts)[3]]
    position = np.flatnonzero((places.chains["bigram"] == common) & (source.segment_of >= 0))
    counts_ = Counts(places, planted_activity(source, position))
    trie = fit_trie(counts_)
    assert trie.levels[1].keys.tolist() == [common] and trie.levels[1].rates[0] > 0.9
    rates = trie.at(View(places, position[:20, None]), "rate")
    assert (rates > 0.9).all()
    token = source.tokens[position[0]]
    elsewhere = np.flatnonzero(
        (source.tokens == token) & (places.chains["bigram"] != common) & (source.segment_of >= 0)
    )
    assert (trie.at(View(places, elsewhere[:20, None]), "rate") < 0.1).all()
    assert trie.figures()["precision"] < 1 or trie.figures()["recall"] == 1
    again = rule_of(plain(trie))
    assert (again.at(View(places, position[:20, None]), "rate") == rates).all()


def test_the_tree_joins_two_conditions(places, source):
    """Fires on a word shape only after a certain word: neither alone will do, the tree says both."""
    positions = np.flatnonzero(source.segment_of >= 0)
    view = View(places, positions[:, None])
    previous = view.keys("previous")[:, 0]
    lower = view.keys("shape")[:, 0] == places.tables["shape"].names.index("lower case")
    known = previous >= 0
    followed = [np.bincount(previous[known & side], minlength=places.vocab) for side in (lower, ~lower)]
    token = np.minimum(*followed).argmax()  # often before words in small letters and often before others
    fires = (previous == token) & lower
    counts = Counts(places, planted_activity(source, positions[fires]))
    rules = [fit_keys(counts, family) for family in ("previous", "shape")]
    train = source.grid(np.flatnonzero(source.segment_part == 0)[:400])
    values = source.values(planted_activity(source, positions[fires]), train)[train >= 0]
    view = View(places, train[train >= 0])
    tree = fit_tree(rules, view, values, counts.base, seed=0)
    assert tree is not None
    predicted = tree.at(view, "rate")
    assert ((predicted > 0.5) == (values > 0)).mean() > 0.999
    assert plain(rule_of(plain(tree))) == plain(tree)


def test_rare_coincidences_make_no_key(places, source):
    """A pair seen once, the latent being active, is no evidence: log-odds under the prior leave it out."""
    rng = np.random.default_rng(1)
    position = np.sort(rng.choice(np.flatnonzero(source.position_part == 0), 60, replace=False))
    rule = fit_keys(Counts(places, planted_activity(source, position)), "bigram")
    assert (rule.total > 1).all()


def test_a_rare_token_that_always_fires_is_the_token_lookup(places, source):
    """The best key there can be, on all three occurrences of a token: a variance without bounds once hid it."""
    train = np.flatnonzero(source.position_part == 0)
    ids, counts = np.unique(source.tokens[train], return_counts=True)
    token = ids[np.flatnonzero(counts == 3)[0]]
    position = np.flatnonzero((source.tokens == token) & (source.segment_of >= 0))
    rule, lookup, *_ = RuleExplainer(places).rules(planted_activity(source, position))
    for each in (rule, lookup):
        assert each.family == "token" and each.keys.tolist() == [token] and each.told == (0,)


def test_the_explainer_gives_rule_and_lookup(places, source):
    found = RuleExplainer(places).explain(source.activity(N_TOKENS))
    assert [e.explainer for e in found] == ["rules", "token-lookup"] and all(e.status == "ok" for e in found)
    assert found[0].rule["family"].startswith("previous") and N_PREVIOUS
    assert "subito dopo" in found[0].text_it or "dopo «" in found[0].text_it


strengths = hnp.arrays(np.float64, st.integers(1, 12), elements=st.integers(0, 5).map(float))


@given(positive=strengths, negative=strengths)
def test_best_threshold_is_the_best_of_all(positive, negative):
    threshold, accuracy = best_threshold(positive, negative)
    said = ((positive > 0) & (positive >= threshold)).mean(), ((negative > 0) & (negative >= threshold)).mean()
    options = np.unique(np.concatenate([positive, negative]))
    if (np.concatenate([positive, negative]) > 0).any():
        assert (said[0] + 1 - said[1]) / 2 == pytest.approx(accuracy)
        assert accuracy == pytest.approx(
            max(((positive >= o).mean() + 1 - (negative >= o).mean()) / 2 for o in options if o > 0)
        )


def test_a_threshold_lies_halfway_down_to_the_next_strength():
    assert best_threshold(np.array([0.8, 0.6]), np.array([0.2])) == (pytest.approx(0.4), 1)
    assert best_threshold(np.array([0.8]), np.array([])) == (0, 0.5)  # without negatives there is nothing to choose by


@pytest.mark.parametrize(
    ("family", "name", "text"),
    [
        ("token", " casa", "«casa»"),
        ("token", "casa", "«…casa»"),
        ("token", ".", "«.»"),
        ("token", " .", "« .»"),
        ("next", "»", "«»»»"),
        ("token", "\n", "«⏎»"),
        ("bigram", ".\n\t", "«.⏎⇥»"),
        ("bigram", " la casa", "«la casa»"),
        ("word", "casa", "«casa»"),
        ("suffix3", "are", "-are"),
        ("prefix3", "dis", "dis-"),
    ],
)
def test_no_two_keys_of_a_family_look_alike(family, name, text):
    assert quoted(family, name, "it") == text


# --- texts -----------------------------------------------------------------------------------------------------------


def test_descriptions_in_two_languages():
    rule = a_rule("token", [" parlare", " mangiare", " cantare", " andare"], [0.4, 0.3, 0.1, 0.1], active=19, total=20)
    assert statement(rule, "it") == "su «parlare», «mangiare», «cantare» o «andare», spesso con finale in -are"
    assert statement(a_rule("previous", [" la"], [0.8]), "it").startswith("subito dopo «la»")
    assert statement(a_rule("previous", [" la"], [0.8]), "en").startswith("right after «la»")
    assert statement(a_rule("suffix5", ["mente", "zione"], [0.5, 0.3]), "it").startswith(
        "alla fine di parole che finiscono in -mente o -zione"
    )
    assert statement(a_rule("prefix3", ["dis"], [0.5]), "en").startswith("in words that begin with dis-")
    assert statement(a_rule("shape", ["elided"], [0.5]), "it").startswith("su parole elise")
    assert statement(a_rule("clitic", ["lo"], [0.5]), "it").startswith("alla fine di verbi con il pronome -lo")
    noted = a_rule("token", [" che"], [0.71], notes={"after": "fatto"})
    assert statement(noted, "it") == "su «che», spesso dopo «fatto»"
    many = a_rule("word", list("abcdefgh"), np.full(8, 0.1))
    assert statement(many, "en") == "on the words «a», «b», «c», «d», «e», «f», …"


def test_a_rule_says_only_what_it_fires_on():
    """Keys below the threshold count neither in the text nor in precision and recall."""
    rule = KeyRule(
        family="token", keys=np.array([0, 1]), names=[" casa", " cosa"], rates=np.array([0.9, 0.1]), weights=np.ones(2),
        mass=np.array([0.7, 0.3]), active=np.array([9.0, 6.0]), total=np.array([10, 60]), n_active=30, base=0.01,
        threshold=0.5,
    )  # fmt: skip
    assert list(rule.figures().values()) == [0.9, 0.3, 90, 0.7]
    assert statement(rule, "it") == "su «casa»"
    again = rule_of(plain(rule))
    assert again.figures()["precision"] == 0.9 and again.threshold == 0.5 and again.keys.tolist() == [0, 1]


def test_a_tree_says_what_must_hold_and_what_must_not():
    conditions = (a_rule("suffix3", ["are"], [1.0]), a_rule("previous-word", ["di"], [1.0]))
    paths = (Path((0,), (1,), 0.9, 1.0, 9, 10, 0.9), Path((0, 1), (), 0.1, 0.1, 1, 10, 0.1))
    tree = TreeRule(conditions=conditions, paths=paths, n_active=10, base=0.01, threshold=0.5)
    assert statement(tree, "it") == "alla fine di parole che finiscono in -are, ma non sulla parola dopo «di»"
    assert "but not on the word after «di»" in statement(tree, "en")


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([((0,), ()), ((1,), (0,))], "on «a»; or on «b»"),  # A, or B but not A
        ([((0, 1), ()), ((0,), (1,))], "on «a»"),  # A and B; or A but not B
        ([((0,), (1,)), ((1,), (0,))], "on «a», but not on «b»; or on «b», but not on «a»"),
        ([((0, 1), ()), ((1, 2), (0,))], "on «a» and on «b»; or on «b» and on «c»"),
        ([((0,), (2,)), ((0, 1), (2,))], "on «a», but not on «c»"),
    ],
)
def test_logic_is_told_in_its_shortest_form(paths, text):
    conditions = tuple(a_rule("token", [f" {name}"], [1.0]) for name in "abc")
    paths = tuple(Path(*sides, 0.9, 1.0, 9, 10, 0.9 - i / 10) for i, sides in enumerate(paths))
    assert statement(TreeRule(conditions=conditions, paths=paths, n_active=10, base=0.01), "en") == text


def test_what_is_judged_is_what_the_text_says(places, source):
    """A rule of a hundred words tells six: the judge knows these, the text holds 120 letters, and its figures are theirs."""
    words = places.tables["word"]
    heavy = np.argsort(-places.totals["word"])[40:140]
    keys, names = np.sort(heavy), [words.names[key] for key in np.sort(heavy).tolist()]
    told = (99, 7, 50, 98, 3)
    rule = a_rule("word", names, np.linspace(0.1, 1, 100) / 55, keys=keys, told=told)
    text = displayed(rule)
    said = re.findall("«(.+?)»", statement(text, "it"))
    assert said == text.names == [names[i] for i in told] == re.findall("«(.+?)»", statement(rule, "en"))
    assert fits(text) and text.figures()["share"] < rule.figures()["share"]
    explanation = explanation_of(0, "rules", rule)
    assert explanation.text_it == statement(text, "it") and len(explanation.rule["keys"]) == 100
    view = View(places, source.grid(np.arange(len(source.start))))
    spoken = {words.names[key] for key in np.unique(view.keys("word")[text.at(view, "rate") > 0]).tolist()}
    assert spoken <= set(said) and (rule.at(view, "rate") > 0).sum() > (text.at(view, "rate") > 0).sum()


def test_a_trie_and_a_tree_say_what_they_tell():
    levels = tuple(
        a_rule(family, [f" {family} {i}" for i in range(9)], np.full(9, 0.1)) for family in ("token", "bigram")
    )
    paths = (Path((0, 1), (), 0.9, 1.0, 9, 10, 0.9),)
    told = (3, 10, 1)
    for rule in (
        TrieRule(levels=levels, told=told),
        TreeRule(conditions=levels, paths=paths, n_active=10, base=0.01, told=told),
    ):
        text = displayed(rule)
        assert [table.names for table in text.tables] == [[" token 3", " token 1"], [" bigram 1"]]
        assert set(re.findall("«(.+?)»", statement(text, "en"))) == {"token 3", "token 1", "bigram 1"}
        assert displayed(rule_of(plain(rule))).figures() == text.figures()
    tree = TreeRule(conditions=levels, paths=paths, n_active=10, base=0.01, told=(3, 1))
    assert statement(tree, "it") == "" and displayed(tree).paths == ()  # no path can be told without its conditions


def test_keys_are_told_in_the_order_of_what_each_adds():
    """Two keys on the same four positives and one on a fifth: the second of the two adds nothing and comes last."""
    hits = np.zeros((10, 4), dtype=bool)
    hits[:4, 0] = hits[:3, 1] = hits[4, 2] = True  # of five positives
    hits[5:, 3] = True  # of five negatives
    gain = np.repeat([5.0, -5.0], 5)
    assert in_order_of_gain(hits, gain, np.zeros(4)) == [0, 2, 1]  # what only takes away is not told
    assert in_order_of_gain(hits, gain, np.array([0.0, 0.0, 0.0, 100.0]))[0] == 3  # unless it is worth it of itself
    assert len(in_order_of_gain(np.zeros((3, 40), dtype=bool), np.ones(3), np.zeros(40))) == 12


names_of = {
    "token": st.text("aà»«, .…-'1\n", min_size=1, max_size=6),
    "word": st.text("aà»«,.'", min_size=1, max_size=6),
    "shape": st.sampled_from(["number", "elided", "capital", "inside a word", "lower case"]),
    "clitic": st.sampled_from(["lo", "glielo", "si"]),
    "suffix": st.text("aeà", min_size=3, max_size=3),
    "prefix": st.text("aeà", min_size=3, max_size=3),
}
SEQUENCES = ("token", "bigram", "trigram")  # what a trie is made of
ALL = (*SEQUENCES, "word", "shape", "clitic", "previous", "previous-word", "next", "suffix3", "prefix3")


def tables(*families):
    """One to four tables of keys, each of one of these families."""
    one = st.sampled_from(families).flatmap(
        lambda family: st.lists(
            names_of.get(family.rstrip("3"), names_of["word" if "word" in family else "token"]),
            min_size=1, max_size=4, unique=True,
        ).map(lambda names: a_rule(family, names, np.full(len(names), 0.1)))
    )  # fmt: skip
    return st.lists(one, min_size=1, max_size=4)


@given(st.data(), st.sampled_from(["it", "en"]))
def test_a_rules_text_read_back_is_the_rule(data, language):
    """No name, whatever signs and quotes are in it, makes one text of two rules."""
    kind = data.draw(st.sampled_from(["keys", "trie", "tree"]))
    parts = data.draw(tables(*(SEQUENCES if kind == "trie" else ALL)))
    if kind == "keys":
        rule = replace(parts[0], notes={"after": "«e»", "before": ", spesso"})
    elif kind == "trie":
        rule = TrieRule(levels=tuple(sorted(parts, key=lambda part: SEQUENCES.index(part.family))))
    else:
        numbers = st.sets(st.integers(0, len(parts) - 1)).map(sorted).map(tuple)
        sides = st.tuples(numbers.filter(bool), numbers).filter(lambda sides: not set(sides[0]) & set(sides[1]))
        path = sides.map(lambda sides: Path(*sides, 0.9, 1.0, 9, 10, 0.9))
        paths = tuple(data.draw(st.lists(path, min_size=1, max_size=3)))
        rule = TreeRule(conditions=tuple(parts), paths=paths, n_active=10, base=0.01)
    told = data.draw(st.permutations(range(sum(len(part.names) for part in rule.tables))))
    text = displayed(replace(rule, told=tuple(told)))
    stated, meant = read(statement(text, language), language), meaning(text, language)
    assert same(stated, meant) if kind == "tree" else stated == meant


def test_a_texts_first_keys_are_a_shorter_explanation(store, source, places):
    """Read key by key: the curve's end is the headline, its beginning the score of one key, of trees all keys at once."""
    with Store(store, {}) as opened:
        explained, where = opened.explanations("rules"), {"explainer": "rules", "control": "", "negatives": "random"}
        whole = opened.values(scorer="detection", metric="balanced_accuracy", **where)
        ends = opened.values(scorer="budget", metric=f"balanced_accuracy_{BUDGETS[-1]}", **where)
        first = opened.values(scorer="budget", metric="balanced_accuracy_1", **where)
    assert whole == pytest.approx(ends) and len(whole) > 10
    shorter = 0
    for latent, score in first.items():
        rule = rule_of(explained[latent].rule)
        if isinstance(rule, TreeRule):
            continue
        test = latent_examples(source, latent, n_train=0).test
        said = RuleJudge(places).detect(explanation_of(latent, "rules", replace(rule, told=rule.told[:1])), test).said
        positive, negative = (said[rows].mean() for rows in test.questions["random"])
        assert (positive + 1 - negative) / 2 == pytest.approx(score)
        shorter += len(rule.told) > 1
    assert shorter


def test_a_tries_keys_are_counted_in_the_order_they_are_told(places, source):
    """Over its tables: the second told may stand in the first table, or in the last."""
    trie = fit_trie(Counts(places, source.activity(N_TOKENS)))
    sizes = [len(table.keys) for table in trie.levels]
    assert min(sizes[:2]) >= 1
    test = latent_examples(source, N_TOKENS, n_train=0).test
    for told in ((0, sizes[0]), (sizes[0], 0)):
        rule = replace(trie, told=told)
        found, frequency = RuleJudge(places).keys(explanation_of(N_TOKENS, "rules", rule), test)
        alone = [
            RuleJudge(places).detect(explanation_of(N_TOKENS, "rules", replace(trie, told=(n,))), test).said
            for n in told
        ]
        assert (found == np.where(alone[0] == 1, 1, np.where(alone[1] == 1, 2, 0))).all() and len(frequency) == 2


def test_every_headline_is_the_score_of_the_text_that_is_shown(store, source, places):
    """At most 120 letters, and who reads the text scores as the judge did that executed the rule."""
    with Store(store, {}) as opened:
        for explainer in ("rules", "token-lookup"):
            scores = opened.values(
                explainer=explainer, control="", scorer="detection", metric="balanced_accuracy", negatives="random"
            )
            explained = opened.explanations(explainer)
            assert len(scores) > 10
            for latent, score in scores.items():
                test = latent_examples(source, latent, n_train=0).test
                view, (positive, negative) = View(places, test.segments.grid[test.rows]), test.questions["random"]
                for language in ("it", "en"):
                    text = explained[latent].text(language)
                    assert len(text) <= 120
                    said = fires(read(text, language), view, language).any(axis=1)
                    assert (said[positive].mean() + 1 - said[negative].mean()) / 2 == pytest.approx(score, abs=1e-9)
