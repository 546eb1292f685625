"""Tasks are rules about facts: what treebanks say, how examples are drawn, which tasks are refused."""

from collections import Counter

import numpy as np
import pytest

from sae_italian.base.errors import UsageError
from sae_italian.benchmark.material import (
    Passage,
    PlacedWord,
    _depth,
    gather,
    genre_passages,
    lexicon_passages,
    micro_passages,
    once,
    pair_passages,
    plainly,
    treebank_passages,
)
from sae_italian.benchmark.tasks import (
    ProbingTask,
    SourceTable,
    all_tasks,
    chosen,
    draw,
    n_balanced,
    plan,
    read_tasks,
    shortage,
)
from tests.analysis.probes.test_treebank import ROWS, TEXT, written

TWICE = (
    "# text = Che bella casa!\n"
    "1\tChe\tche\tDET\tDE\tPronType=Exc\t3\tdet\t_\t_\n"
    "2\tbella\tbello\tADJ\tA\tGender=Fem|Number=Sing\t3\tamod\t_\t_\n"
    "3\tcasa\tcasa\tNOUN\tS\tGender=Fem|Number=Sing\t0\troot\t_\tSpaceAfter=No\n"
    "4\t!\t!\tPUNCT\tFS\t_\t3\tpunct\t_\t_\n\n"
)


def task(**rules) -> ProbingTask:
    return ProbingTask(**{"id": "T", "en": "t", "it": "t", "family": "f", "source": "ud", "unit": "word"} | rules)


def passages(answers, test, value="", lemma=None):
    """One word each: positive or not, on a side, with a fact to balance within and a lemma."""
    found = []
    for i, (yes, side) in enumerate(zip(answers, test, strict=True)):
        facts = {"Gender": "Fem" if yes else "Masc", "lemma": lemma[i] if lemma else str(i), "bin": value}
        found.append(Passage(f"parola {i}", f"d{i // 5}", bool(side), {}, [PlacedWord(0, 6, facts)]))
    return found


def test_facts_of_a_treebank_are_those_of_its_columns(tmp_path):
    (passage,) = treebank_passages([written(tmp_path, ROWS, TEXT)])
    dell, amica, gliel, ho, detto, _ = (word.facts for word in passage.words)
    assert (dell["upos"], dell["lemma"], dell["form"], dell["Gender"]) == ("ADP+DET", "di", "dell'", "Fem")
    assert (amica["left"], amica["place"], amica["deprel"]) == ("ADP+DET", "before", "obl")
    assert gliel["deprel"] == "iobj+obj" and ho["head"] == "VERB"
    assert detto["aux"] == "avere" and detto["children"] == "obl iobj obj aux punct" and detto["after"] == "punct"
    assert passage.facts["depth"] == "3" and passage.facts["mark"] == "."


def test_a_sentence_is_as_deep_as_its_longest_way_to_the_root():
    chain = {str(i): (str(i), *[""] * 5, str(i - 1)) for i in range(1, 6)}
    assert _depth(chain) == 5 and _depth({**chain, "1": ("1", *[""] * 5, "5")}) == 6  # a circle is not followed


def test_a_copy_is_left_out_and_the_one_for_test_stays(tmp_path):
    for name in ("it_x-ud-train.conllu", "it_x-ud-test.conllu"):
        (tmp_path / name).write_text(TWICE + TWICE, encoding="utf-8")
    some = treebank_passages([tmp_path])
    assert len({p.document for p in some}) == 2  # a run of sentences that crosses from file to file is two
    assert [passage.test for passage in once(some)] == [True]
    assert gather([tmp_path], sources=["ud"]).n_copies == 3


def test_two_treebanks_in_one_folder_keep_the_split_of_their_files(tmp_path):
    for name in ("it_a-ud-dev", "it_a-ud-test", "it_b-ud-dev", "it_b-ud-test", "it_b-ud-train"):
        (tmp_path / f"{name}.conllu").write_text(TWICE.replace("# text", f"# {name}\n# text"), encoding="utf-8")
    assert [passage.test for passage in treebank_passages([tmp_path])] == [False, True, False, True, False]


def test_no_text_of_the_grammar_or_of_the_pairs_is_in_training_and_in_test():
    """A third of the grammar's test sentences were: short ones come again and again, as the subjects of pairs do."""
    material = gather(sources=["micro", "micro-documents", "pairs"])
    for name, some in material.passages.items():
        sides = [{plainly(p.text) for p in some if p.test == test} for test in (False, True)]
        assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == len(some), name
    assert material.n_copies > 500
    both = Counter(p.document for p in pair_passages(40))
    assert set(both.values()) == {2}  # what is right and what is wrong of a pair are on one side


def test_what_is_said_ends_with_its_quote_or_with_who_says_it():
    passages = micro_passages(150)
    said = [p.text for p in passages if p.text.startswith("«") and p.text.count("«") == p.text.count("»") == 1]
    assert {text[text.index("»") - 1 :][:3] for text in said} >= {".»", "?»", "?»,"}
    assert not any(p.text.startswith(("»", ",")) for p in passages)
    assert all(p.text[word.start : word.end] == word.facts["form"] for p in passages for word in p.words)


def test_counts_are_those_that_were_counted_by_hand(shared):
    """benchmark.md B1 to B3, counted there by other code."""
    some = treebank_passages([shared / "data/ud/ISDT", shared / "data/ud/ParTUT"])
    found = once(some)
    assert [sum(p.test == test for p in found) for test in (False, True)] == [2350, 567]
    assert len(some) - len(found) == 219
    known = {task.id: task for task in all_tasks()}
    source = SourceTable(found)
    counted = {}
    for name in ("W13", "W16", "W24", "S4", "S9", "S12", "S18", "S22"):
        items = source.items(known[name])
        counted[name] = [
            int(((items.answer == yes) & (items.test == t)).sum()) for t in (False, True) for yes in (True, False)
        ]
    assert (
        counted
        == {
            "W13": [314, 2519, 59, 654],
            "W16": [277, 3368, 43, 787],
            "W24": [461, 386, 92, 48],
            "S4": [470, 1880, 139, 428],
            "S9": [624, 1726, 140, 427],
            "S12": [332, 2018, 43, 524],
            "S18": [392 - 15, 1958 + 15, 70 - 2, 497 + 2],  # without nouns: «doveri», «al potere», «per volere di»
            "S22": [762, 1588, *counted["S22"][2:]],
        }
    )


def test_rules_ask_of_words_and_of_texts():
    source = SourceTable(
        [Passage("a b", "d", False, {"k": "x"}, [PlacedWord(0, 1, {"u": "N"}), PlacedWord(2, 3, {"u": "V"})])]
    )
    longer = SourceTable([Passage("a", "d", False, {}, [PlacedWord(0, 1, {"u": "NUM"})])])
    assert longer.holds({"u": "N"}, "word").tolist() == [False]  # a fact matches whole
    assert source.holds({"u": "N|V"}, "word").tolist() == [True, True]
    assert source.holds({"u": "N", "absent": ".*"}, "word").tolist() == [False, False]
    assert source.holds({"k": "x", "some": {"u": "V"}}, "text").tolist() == [True]
    assert source.holds({"none": {"u": "V"}}, "text").tolist() == [False]


def test_no_lemma_is_on_both_sides():
    made = passages([True, False] * 200, [i % 3 == 0 for i in range(400)], lemma=[str(i // 7) for i in range(400)])
    items = SourceTable(made).items(task(positive={"Gender": "Fem"}, apart="lemma"))
    sides = [{made[i].words[0].facts["lemma"] for i in items.passage[items.test == test]} for test in (False, True)]
    assert min(map(len, sides)) > 5 and not sides[0] & sides[1]


def test_a_draw_is_balanced_within_every_value_and_the_same_for_the_same_seed():
    made = passages([True] * 30 + [False] * 90, [False] * 120, "a") + passages(
        [True] * 90 + [False] * 30, [True] * 120, "b"
    )
    items = SourceTable(made).items(task(positive={"Gender": "Fem"}, within="bin"))
    found = draw(items, 3)
    for side, test in zip(found, (False, True), strict=True):
        assert len(side) == 60 and items.answer[side].sum() == 30
        assert set(items.test[side]) == {test} and len(set(side.tolist())) == 60
    assert [side.tolist() for side in draw(items, 3)] == [side.tolist() for side in found]
    assert draw(items, 4)[0].tolist() != found[0].tolist()
    assert n_balanced(items[~items.test]) == 30 and n_balanced(items) == 60
    wanted = np.isin(np.arange(len(items)), np.concatenate([side[:10] for side in found]))
    for side, n in zip(draw(items, 7, wanted, (8, 4)), (8, 4), strict=True):  # of texts that are read already, first
        assert len(side) == n and wanted[side].mean() >= 0.5


def test_a_task_with_fewer_than_20_positives_is_refused_by_name():
    made = passages([True, False] * 50 + [True] * 19 + [False] * 40, [False] * 100 + [True] * 59)
    few = task(id="rara", positive={"Gender": "Fem"})
    assert shortage(few, SourceTable(made).items(few)) == "rara: 19 < 20 (test)"
    material = gather()._replace(passages={"ud": made}, corpora={}, n_copies=0)
    planned = plan(material, [few])
    assert not planned.problems and planned.refused[0].startswith("rara")


def test_a_frequency_is_that_of_all_examples_not_of_those_that_are_read():
    """The texts that are read are drawn balanced, half of them with what is asked, however rare it is."""
    made = passages([i % 10 == 0 for i in range(600)], [i % 3 == 0 for i in range(600)])
    planned = plan(gather(sources=[])._replace(passages={"ud": made}), [task(positive={"Gender": "Fem"})])
    (problem,) = planned.problems
    assert problem.answer.mean() == 0.5 and problem.frequency == pytest.approx(0.1)


def test_each_value_makes_a_task_and_names_say_it():
    made = list(
        read_tasks(
            {
                "family": "f",
                "source": "s",
                "unit": "text",
                "tasks": [{"id": "G", "en": "genre {}", "it": "genere {}", "each": {"genre": ["*"]}, "quick": ["b"]}],
            },
            {"genre": ["a", "b"]},
        )
    )
    assert [(t.id, t.en, t.it, t.quick) for t in made] == [
        ("G-a", "genre a", "genere a", False),
        ("G-b", "genre b", "genere b", True),
    ]
    assert made[0].positive == {"genre": "(.* )?a( .*)?"}
    dotted = {"id": "G", "en": "{}", "it": "{}", "each": {"genre": ["it.web"]}}
    (dotted,) = read_tasks({"family": "f", "source": "s", "unit": "text", "tasks": [dotted]})
    assert dotted.positive == {"genre": r"(.* )?it\.web( .*)?"}  # a value is no pattern


def test_there_are_fifty_tasks_and_twelve_are_quick():
    tasks = all_tasks()
    assert len(tasks) >= 50 and len({t.id for t in tasks}) == len(tasks)
    assert len(chosen(tasks, "quick", "")) == 12 and not any(t.form for t in chosen(tasks, "quick", ""))
    assert {t.family for t in tasks} >= {
        "ud-words",
        "ud-sentences",
        "micro-constructions",
        "pairs",
        "lexicon",
        "letters",
    }
    with pytest.raises(UsageError, match="'W99' is unknown"):
        chosen(tasks, "quick", "W99")
    for preset in ("nix", None):  # gave no task, or those of quick
        with pytest.raises(UsageError, match=f"preset {preset!r} is unknown. Valid: quick, full"):
            chosen(tasks, preset, "")
    with pytest.raises(UsageError, match="source 'micros' is unknown. Did you mean 'micro'"):
        gather(sources=("micros",))


def test_a_genre_loses_what_gives_it_away(jsonl, tmp_path):
    file = tmp_path / "leggi.jsonl"
    file.write_text(
        "".join(
            f'{{"text": "Art. {i} Il testo https://x.it/{i} del 1999 [nota] {"parola " * 80}"}}\n' for i in range(60)
        ),
        encoding="utf-8",
    )
    found = genre_passages({"leggi": str(file), "notizie": str(jsonl)})
    laws = [p for p in found if p.facts["genre"] == "leggi"]
    assert laws and all(not any(c.isdigit() for c in p.text) and "http" not in p.text for p in laws)
    assert not {p.document for p in found if p.test} & {p.document for p in found if not p.test}
    with pytest.raises(UsageError, match="one corpus has no genres"):
        gather(texts={"leggi": str(file)})


def test_the_lexicon_leaves_ambiguous_forms_out():
    def word(form, upos, lemma=""):
        facts = {"form": form, "upos": upos, "lemma": lemma or form}
        return Passage(form, "d", False, {}, [PlacedWord(0, len(form), facts)])

    nouns = [word("casa", "NOUN"), word("case", "NOUN", "casa"), word("porta", "NOUN"), word("città", "NOUN")]
    found = lexicon_passages([*nouns, word("porta", "VERB")])
    assert {p.text for p in found} == {"La parola è casa", "La parola è case", "La parola è città"}
    assert len({p.document for p in found}) == 2  # the forms of a lemma are on one side
    assert all(p.text[p.words[0].start :] == p.words[0].facts["form"] for p in found)
    assert np.unique([p.words[0].facts["letter"] for p in found]).tolist() == ["c"]


def test_a_question_in_quotes_is_one_and_a_modal_noun_is_no_verb(tmp_path):
    rows = (
        "1\tChi\tchi\tPRON\tPQ\tPronType=Int\t2\tnsubj\t_\t_\n2\tLEMMA\tVERB\tV\tVerbForm=Fin\t0\troot\t_\t_\n"
        "3\til\til\tDET\tRD\t_\t4\tdet\t_\t_\n4\tpotere\tpotere\tNOUN\tS\t_\t2\tobj\t_\tSpaceAfter=No\n"
        '5\t?\t?\tPUNCT\tFS\t_\t2\tpunct\t_\tSpaceAfter=No\n6\t"\t"\tPUNCT\tFB\t_\t2\tpunct\t_\t_\n\n'
    )
    file = tmp_path / "prova.conllu"
    verbs = ("vuole\tvolere", "sa\tsapere")
    text = [f'# text = Chi {verb.split()[0]} il potere?"\n' + rows.replace("LEMMA", verb) for verb in verbs]
    file.write_text("".join(text), encoding="utf-8")
    source, known = SourceTable(treebank_passages([file])), {task.id: task for task in all_tasks()}
    assert source.items(known["S1"]).answer.tolist() == [True, True]
    assert source.items(known["S18"]).answer.tolist() == [True, False]
