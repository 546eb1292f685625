"""`key=value` words: one reader for every command, and one line for every word that cannot be."""

from typing import Literal

import pytest

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.labels import kinds_of, read_word, read_words
from sae_italian.cli import main

DIGITS, DEEP = "9" * 6_000, "[" * 10_000
KINDS = {"n": int | None, "name": str, "how": Literal["top", "all"], "some": list[int], "body": dict[str, object]}


def test_values_are_read_as_their_types():
    words = ["n=1_000", "name=no", "how=all", "some=[1, 2]", "body={top_k: 1}"]
    assert read_words(words, KINDS) == {"n": 1000, "name": "no", "how": "all", "some": [1, 2], "body": {"top_k": 1}}
    assert read_words(["n=null", "name=a=b", "name=12"], KINDS) == {"n": None, "name": "12"}
    kinds = kinds_of({"size": 20, "start": 0, "share": 0.5, "on": False, "text": "", "many": [0.5, 1]})
    words = ["size=1", "start=0", "share=2", "on=true", "text=3", "many=[1, 0.25]"]
    assert read_words(words, kinds) == {"size": 1, "start": 0, "share": 2.0, "on": True, "text": "3", "many": [1, 0.25]}
    assert read_word("sae.k = 64") == ("sae.k", 64)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("x=3", "'x=3' is no setting here.*Valid: n, name"),
        ("nam=3", "Did you mean 'name'"),
        ("n", "key=value was expected"),
        ("n=many", "n is 'many'; it should be a valid integer[.]"),
        ("how=best", "how is 'best'; it should be 'top' or 'all'"),
        ("some=3", "some is 3; it should be a valid list"),
        ("some=[a]", "some is 'a'; it should be a valid integer"),
        (f"n={DIGITS}", "cannot be read as YAML"),
        (f"some={DEEP}", "cannot be read as YAML"),
        ("some={a: 1, a: 2}", "is there twice"),
        ("body={a: 2026-01-01}", "a number, a text or a list was expected"),
        ("body={a: &x [*x]}", "a number, a text or a list was expected"),
        ("body={a: !!python/object:os.system x}", "cannot be read as YAML"),
    ],
)
def test_what_cannot_be_is_one_short_line(word, said):
    with pytest.raises(UsageError, match=said) as refused:
        read_words([word], KINDS)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("value", [DIGITS, DEEP, "{a: &x [*x]}", "!!python/object:os.system x", "{a: 1, a: 2}"])
@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("train", "mini/topk", "--dry-run"), "sae.k"),
        (("reproduce", "cunningham-2023"), "latents"),
        (("reproduce", "baselines", "an-sae"), "kinds"),
        (("autointerp", "cache", "--explainer", "llm"), "extra_body"),
        (("cache", "build", "an-sae", "--out", "c"), "windows_per_shard"),
        (("tree", "an-sae", "--latent", "3"), "branches"),
        (("explainita", "predict", "d", "o.jsonl", "--task", "1", "--explainer", "llm"), "extra_body"),
    ],
)
def test_every_command_answers_in_one_line(capsys, tmp_path, monkeypatch, command, key, value):
    monkeypatch.chdir(tmp_path)
    assert main([*command, f"{key}={value}"]) == 2
    said = capsys.readouterr().err
    assert key in said and said.count("\n") == 1 and len(said) < 700


@pytest.mark.parametrize("given", [40, None, ["top"], 2.5])
def test_what_is_no_text_is_looked_for_as_one(given):
    """A number where a name is meant died in `difflib`."""
    assert nearest(given, ["random", "silent"]) == "Valid: random, silent."
