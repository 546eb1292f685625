"""The bilingual table of labels: whole, in order, in both languages."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sae_italian import micro_italiano
from sae_italian.analysis.labels import _labels
from sae_italian.analysis.treebank import label_names, micro_treebank
from sae_italian.base.labels import filled, label, labels, page_labels
from sae_italian.browser.page import static_text
from sae_italian.evaluation.card import EvaluationCard


def test_a_label_in_each_language():
    assert label("card.dead_in_100k", "en") == "Dead latents in 100,000 tokens"
    assert label("card.dead_in_100k", "it") == "Latenti morti in 100.000 token"
    assert label("gold.gender=fem", "it") == "femminile"
    with pytest.raises(KeyError):
        label("card.none")


def test_every_key_has_both_languages_and_only_text():
    both = page_labels()
    assert both["scorer.detection"] == ["Detection", "Detection"] and len(both) > 130
    assert all(isinstance(text, str) and text for texts in both.values() for text in texts)


def test_the_card_names_all_its_numbers_in_its_order():
    numbers = [field.name for field in dataclasses.fields(EvaluationCard) if field.type == "Measured"]
    assert list(labels("card")) == numbers


def test_numbers_are_written_as_the_language_does():
    values = {"n": 65536, "share": 0.1234, "name": "1.5", "yes": True}
    text = "{n:,} {share:.1%} {share:.2f} {name} {yes}"
    assert filled(text, values, "it") == "65.536 12,3 % 0,12 1.5 True"
    assert filled(text, values, "en") == "65,536 12.3 % 0.12 1.5 True"


@pytest.mark.skipif(not shutil.which("node"), reason="node is absent: apt-get install nodejs")
def test_every_gold_and_treebank_label_is_told_in_words():
    """The labels of MicroItaliano, of its latents and of treebanks, in UD's parts of speech, as the browser's page shows them."""
    told = {"NOUN Fem Sing", "Language=it", "Language=en", *label_names([micro_treebank(300)])}
    tags = "ADJ ADP ADV AUX CCONJ DET INTJ NOUN NUM PART PRON PROPN PUNCT SCONJ SYM VERB X"
    told |= {f"{name}={tag}" for tag in tags.split() for name in ("UPOS", "upos")}
    for document in micro_italiano.documents(300):
        built = [span.labels["construction"] for span in document.constructions]
        told |= {one for word in document.words for _, one in _labels(word.labels, built, document.register)}
    page = f"const LABELS = {json.dumps(page_labels())};{static_text('base.js')}"
    asked = f"{json.dumps(sorted(told))}.map((one) => [one, ...LANGUAGES.map(([name]) => labelName(one, name))])"
    done = subprocess.run(["node"], input=f"{page}console.log(JSON.stringify({asked}))", capture_output=True, text=True)
    names = {one: both for one, *both in json.loads(done.stdout)}
    assert names["NOUN Fem Sing"] == ["sostantivo femminile singolare", "noun feminine singular"] and len(names) > 150
    assert not [one for one, both in names.items() if any("=" in name or name == one for name in both)]


def test_apostrophes_are_typographic():
    assert not [key for key, texts in page_labels().items() if any("'" in text for text in texts)]


def test_no_article_stands_before_a_number_that_is_filled_in():
    """It would depend on the number: il 12 %, l’8 %, lo 0,9 %."""
    folder = Path(__file__).parents[2] / "sae_italian"
    article = re.compile(r"\b(?:(?:il|lo|[dns]?[ae]l(?:lo)?|sul(?:lo)?|un|vale) |[dns]?[ae]?ll?’)\{")
    texts = {file: file.read_text("utf-8") for file in folder.rglob("*.yaml")}
    assert not [(file.name, found.group()) for file, text in texts.items() for found in article.finditer(text)]
    assert article.search("sullo {density} dei token") and article.search("nell’{share}")


def test_what_was_proofread_stays_so():
    """The table of docs/results/strings.md: what was wrong stands in no file, what is right now in one."""
    root = Path(__file__).parents[2]
    rows = [line.strip("| ").split(" | ") for line in (root / "docs/results/strings.md").read_text("utf-8").split("\n")]
    rows = [row for row in rows if len(row) == 3 and row[2].strip() != "where" and "---" not in row[0]]
    files = [file for kind in ("py", "yaml", "js") for file in (root / "sae_italian").rglob(f"*.{kind}")]
    texts = " ".join(" ".join(file.read_text("utf-8").split()).replace('" "', "") for file in files)
    assert len(rows) >= 30
    for was, now, _ in rows:
        assert was not in texts and now in texts, (was, now)
