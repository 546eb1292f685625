"""Sets of the hub from stand-ins with its layouts: paths of its Parquet conversion, columns as loaders read them."""

import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.benchmark.material import NO_LAYOUT, Material, _of_row, gather_hub, hub_sets, read_set
from sae_italian.benchmark.tasks import SourceTable, hub_tasks, plan
from tests.corpora.hub_stand_in import COMMIT, parquet
from tests.corpora.test_hub import server  # noqa: F401  # a fixture

N = 400
TEXT = {
    "text": "Frase numero {i}.",
    "full_text": "Frase numero {i}.",
    "sentence": "Frase numero {i}.",
    "test_case": "Frase {i}.",
}
FLAGS = dict.fromkeys(("opos", "oneg", "hs", "stereotype", "irony", "sarcasm", "misogynous", "acceptability"), "flag")


def cell(name, i, yes):
    """What a column of the hub holds in row i, whose answer is yes or no."""
    if name in TEXT:
        return TEXT[name].format(i=i)
    known = {
        "hateful": "hateful" if yes else "non-hateful",
        "entailment": "SI" if yes else "NO",
        "label": int(yes),
        "answer": "B" if yes else "A",
        "correct_answer_num": "2" if yes else "1",
        "label_text": ("alarm", "weather")[yes],
        "templ_id": i // 4,
        "flores_passage": f"Brano {i // 2}.",
        "sentence1": "Il cane dorme.",
        "sentence2": f"Un cane {i} corre.",
        "start2": 3,
        "end2": 7,
        "tokens": ["Anna", "vive", "a", f"Roma{i}"],
        "ner_tags": [1, 0, 0, 5],
    }
    return known.get(name, str(int(yes)) if name in FLAGS else f"{name} {i}")


def columns_of(one):
    rules = [rule for task in one["tasks"] for rule in (task.get("positive", {}), task.get("each", {}))]
    named = {*one["text"], *one["choices"], *one["span"], one["answer"], one["words"], one["tags"], one["group"]}
    return (named | {key for rule in rules for key in rule}) - {"", "right", "tag"}


def stand_in(server, name, one):  # noqa: F811
    files = server.repositories.setdefault(one["hub"], {})
    for split, pattern in one["files"].items():
        rows = [{key: cell(key, i + 1000 * (split == "test"), i % 2 == 0) for key in columns_of(one)} for i in range(N)]
        files[pattern.replace("*", "0000")] = parquet(rows)


@pytest.mark.parametrize("name", hub_sets())
def test_every_set_is_read_in_its_layout_and_makes_its_tasks(server, name):  # noqa: F811
    one = hub_sets()[name]
    stand_in(server, name, one)
    passages, commit = read_set(name, one)
    assert commit == COMMIT and {p.test for p in passages} == {False, True}
    table = SourceTable(passages)
    tasks = [task for task in hub_tasks() if task.source == name]
    asked = [task for task in tasks if task.id.rpartition("-")[2] in ("alarm", "weather") or name != "massive"]
    for task in asked:
        items = table.items(task)
        assert set(items.answer) == {True, False}, task.id
    sides = [{p.document for p in passages if p.test == test} for test in (False, True)]
    assert not sides[0] & sides[1]


def test_there_are_a_dozen_sets_and_none_runs_code():
    sets = hub_sets()
    assert len(sets) >= 12
    assert all(one.keys() == {"hub", "files", "tasks", *NO_LAYOUT} for one in sets.values())  # no key is misspelled
    assert all(path.endswith(".parquet") for one in sets.values() for path in one["files"].values())


def test_a_word_is_read_in_the_second_sentence_and_a_tagged_one_in_its_place(server):  # noqa: F811
    for name in ("evalita_wic", "wikineural"):
        stand_in(server, name, hub_sets()[name])
    wic, ner = (read_set(name, hub_sets()[name])[0][0] for name in ("evalita_wic", "wikineural"))
    assert wic.text[wic.words[0].start : wic.words[0].end] == "cane" and wic.words[0].start > len("Il cane dorme.")
    assert [ner.text[w.start : w.end] for w in ner.words][:3] == ["Anna", "vive", "a"]
    one = hub_sets()["evalita_wic"]
    row = {key: cell(key, 0, True) for key in columns_of(one)} | {
        "sentence2": "  Un cane corre. ",
        "start2": 5,
        "end2": 9,
    }
    (blank,) = _of_row("evalita_wic", one, row, "g", False)
    assert blank.text[blank.words[0].start : blank.words[0].end] == "cane"  # places are of the text as it stands there


def test_the_right_choice_is_told_by_number_or_letter(server):  # noqa: F811
    for name, column in (("arc", "option_b"), ("belebele", "mc_answer2")):
        stand_in(server, name, hub_sets()[name])
        passages, _ = read_set(name, hub_sets()[name])
        assert sum(p.facts["right"] == "yes" for p in passages) * 4 == len(passages)
        assert any(column in p.text and p.facts["right"] == "yes" for p in passages)


def test_a_text_of_both_splits_is_for_test_alone(server):  # noqa: F811
    """Published sets hold copies too: a probe would know them by heart."""
    one = hub_sets()["itacola"]
    rows = [{"sentence": f"Frase {i}.", "acceptability": i % 2} for i in range(N)]
    server.repositories[one["hub"]] = {path.replace("*", "0000"): parquet(rows) for path in one["files"].values()}
    material, failed = gather_hub(["itacola"])
    assert not failed and material.n_copies == N == len(material.passages["itacola"])
    assert all(passage.test for passage in material.passages["itacola"])


def test_a_layout_that_has_changed_a_small_set_and_no_network_are_named(server):  # noqa: F811
    one = hub_sets()["ironita"]
    server.repositories[one["hub"]] = {p.replace("*", "0"): parquet([{"testo": "x"}]) for p in one["files"].values()}
    with pytest.raises(DataError, match="no column 'text'; it has testo"):
        read_set("ironita", one)
    with pytest.raises(UsageError, match="no set of the hub could be read"):
        gather_hub(["xcopa"])
    few = {**hub_sets()["itacola"], "hub": "a/b"}
    rows = [{"sentence": f"Frase {i}", "acceptability": i % 2} for i in range(60)]
    server.repositories["a/b"] = {path.replace("*", "0"): parquet(rows) for path in few["files"].values()}
    passages, _ = read_set("itacola", few)
    (task,) = [task for task in hub_tasks() if task.source == "itacola"]
    assert "30 < 50 (train)" in plan(Material({"itacola": passages}, {}), [task]).refused[0]
