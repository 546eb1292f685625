"""Live work, called as server and notebook call it: it agrees with the cache, and refuses what makes no sense."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_italian.autointerp.llm import LLMSettings
from sae_italian.base.errors import UsageError
from sae_italian.base.labels import label
from sae_italian.browser.contexts import AFTER, BEFORE
from sae_italian.browser.live import MAX_LETTERS, NEW_TOKENS, PER_TOKEN, Live, Refused, in_both
from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache
from sae_italian.models.activations import read_activations
from tests.autointerp.llm.endpoint import FakeEndpoint
from tests.browser.nasty import CONTROL, LONG_WORD, RTL, SCRIPT
from tests.browser.schema import check, check_card

from .conftest import open_with_live


def asking(endpoint):
    url = {"endpoint": endpoint.url, "llm_model": "prova"}
    return LLMSettings(explainer="llm", judge="llm", timeout=120, attempts=1, concurrency=1, **url)


SENTENCE = "Le ragazze italiane hanno letto un libro perché è bello 🙂."


def test_a_sentences_latents_are_those_of_the_sae(live, mini):
    found = live.tokens(SENTENCE)
    assert "".join(piece["text"] for piece in found["tokens"]) == SENTENCE and not found["truncated"]
    ids = torch.tensor([mini.tokenizer(SENTENCE).input_ids])
    x = read_activations(mini, ids, live.sae.cfg.metadata.hook_name)[0]
    with torch.no_grad():
        dense = live.sae.encode(x).numpy()
    dense = dense[1:]  # BOS is read past
    assert found["n_tokens"] == len(dense)
    best = dense.max(axis=0)
    order = np.argsort(-best, kind="stable")[: len(found["strongest"])]
    assert [one["latent"] for one in found["strongest"]] == [i for i in order.tolist() if best[i] > 0]
    for one in found["strongest"]:
        assert one["value"] == pytest.approx(best[one["latent"]], rel=1e-4)
        assert (one["latent"], one["value"]) in found["tokens"][one["token"]]["latents"]
    assert all(0 < len(piece["latents"]) <= PER_TOKEN for piece in found["tokens"])


def first_whole_document(cache):
    """Return a document that begins right after a window's BOS and ends in it, and its positions."""
    context = cache.manifest.context_size
    for begin in range(1, cache.n_positions, context):
        index = int(cache.doc[begin])
        here = np.flatnonzero(cache.doc == index)
        if cache.whole("start")[begin] == 0 and here[0] == begin and here[-1] < begin + context - 2:
            return cache.document(index), here
    raise AssertionError("no document begins a window")


def test_the_cache_and_the_live_sentence_agree(live, cache):
    document, here = first_whole_document(cache)
    found = live.tokens(document.text)
    assert found["n_tokens"] == len(here) and found["strongest"]
    for one in found["strongest"]:
        position, value = cache.latent(one["latent"])
        assert one["value"] == pytest.approx(value[np.isin(position, here)].max(), rel=2e-3)


@pytest.mark.parametrize("text", [SCRIPT, RTL, CONTROL, LONG_WORD[:10_000], "\ud800 mezza", "  \n\t a"])
def test_any_text_is_taken_and_comes_back_whole(live, text):
    found = live.tokens(text)
    joined = "".join(piece["text"] for piece in found["tokens"])
    clean = text.replace("\x00", " ").replace("\ud800", "\ufffd")
    assert joined == clean if not found["truncated"] else clean.startswith(joined)
    joined.encode()


def test_a_long_text_is_cut_and_says_so(live):
    found = live.tokens("parola " * 1200)
    assert found["truncated"] and found["n_tokens"] <= 512


def test_steering_writes_with_and_without(live, active):
    found = live.call("steer", {"latent": active, "prompt": "La ragazza", "strengths": [0, 5]})
    assert found["unit"] == pytest.approx(float(live.maximum[active]))
    assert found["steered"][0]["text"] == found["unsteered"]["text"] and found["steered"][0]["divergence"] < 1e-6
    assert found["steered"][1]["divergence"] > 1e-3


def test_ablation_names_next_tokens_where_the_latent_is_active(live):
    latent = live.tokens("La ragazza legge")["strongest"][0]["latent"]
    found = live.call("ablate", {"latent": latent, "prompt": "La ragazza legge"})
    assert found["n_active"] >= 1 and found["positions"][0]["lowered"] and found["positions"][0]["divergence"] > 0


def test_the_rule_made_now_is_the_stored_one(live, opened):
    source, _ = opened
    stored = {i: e for i, e in source.explanations["rules"].items() if e.status == "ok"}
    latent = next(iter(stored))
    (rule,) = live.explain(latent)["explanations"]
    assert rule["kind"] == "rule" and rule["status"] == "ok" and rule["text_it"] and 0 <= rule["precision"] <= 1


def test_a_dead_latent_is_said_to_be_dead(live):
    dead = np.flatnonzero(live.cache.statistics["count"] == 0)
    if len(dead):
        assert live.explain(int(dead[0]))["explanations"][0]["status"] == "dead"


def test_a_latent_that_never_fired_is_steered_by_its_bare_direction(nasty):
    source, live = nasty
    dead = int(np.flatnonzero(live.cache.statistics["count"] == 0)[0])
    assert live.steer(dead, "La città", [1.0])["unit"] == 1.0
    assert live.explain(dead)["explanations"][0]["status"] == "dead"
    assert source.card(dead)["groups"] == [] and source.row(dead)["status"] == "not explained"


def test_an_llm_explains_beside_the_rule_where_one_is_configured(live, opened, tmp_path):
    shutil.copytree(live.cache.folder, tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache")
    latent = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok")
    with FakeEndpoint(lambda body: '{"spiegazione": "parole al femminile plurale"}') as endpoint:
        asked = Live(cache, live.sae, live.model, asking(endpoint))
        rule, llm = asked.explain(latent)["explanations"]
        assert rule["kind"] == "rule" and llm["kind"] == "llm" and llm["status"] == "ok"
        assert llm["text_it"] == "parole al femminile plurale" and len(endpoint.requests) == 1
        assert asked.explain(latent)["explanations"][1] == llm and len(endpoint.requests) == 1  # from the ledger
    other = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok" and i != latent)
    rule, llm = asked.explain(other)["explanations"]  # the server is gone: the rule comes all the same
    assert rule["status"] == "ok" and llm["status"] != "ok" and llm["problem"]


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("tokens", {}, "takes sentence"),
        ("tokens", {"sentence": "a", "file": "/etc/passwd"}, "nothing else"),
        ("tokens", ["a"], "takes"),
        ("tokens", {"sentence": 5}, "not a text"),
        ("tokens", {"sentence": " \n"}, "empty"),
        ("tokens", {"sentence": "a" * (MAX_LETTERS + 1)}, "10,000"),
        ("explain", {"latent": 10**9}, "latents 0 to 255"),
        ("explain", {"latent": -1}, "latents 0 to 255"),
        ("explain", {"latent": "3"}, "number"),
        ("explain", {"latent": True}, "number"),
        ("steer", {"latent": 1, "prompt": "a", "strengths": []}, "numbers"),
        ("steer", {"latent": 1, "prompt": "a", "strengths": [float("nan")]}, "numbers"),
        ("steer", {"latent": 1, "prompt": "a", "strengths": [1e9]}, "numbers"),
        ("steer", {"latent": 1, "prompt": "a", "strengths": [1] * 7}, "numbers"),
        ("steer", {"latent": 1, "prompt": "parola " * 1000, "strengths": [1]}, "tokens; at most"),
        ("ablate", {"latent": 1, "prompt": "parola " * 1000}, "tokens; at most"),
        ("ablate", {"latent": 1, "prompt": "\x00"}, "empty"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_one_line(live, name, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        live.call(name, arguments)
    assert "\n" not in str(caught.value)
    said = in_both(caught.value)
    assert said["error_en"] == str(caught.value)
    assert (said["error_it"] != said["error_en"]) == isinstance(caught.value, Refused)  # what somebody typed


def test_a_prompt_that_fits_is_steered_and_one_token_more_is_not(live, mini, monkeypatch):
    monkeypatch.setattr(
        "sae_italian.browser.live.steer", lambda *_, **__: SimpleNamespace(as_dict=lambda: {"text": ""})
    )
    most = mini.config.max_position_embeddings - NEW_TOKENS
    fits, more = (
        next(n for n in range(most, 0, -1) if len(mini.tokenizer("la " * n)["input_ids"]) <= end)
        for end in (most, most + 8)
    )
    assert most - 8 < len(mini.tokenizer("la " * fits)["input_ids"]) < len(mini.tokenizer("la " * more)["input_ids"])
    assert live.call("steer", {"latent": 1, "prompt": "la " * fits, "strengths": [1]})
    with pytest.raises(Refused, match="Shorten it"):
        live.call("steer", {"latent": 1, "prompt": "la " * more, "strengths": [1]})


# --- explanations that are kept ------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(opened, live, tmp_path):
    """A copy of the cache without explanations, with its records and its live work."""
    folder = shutil.copytree(live.cache.folder, tmp_path / "cache", ignore=shutil.ignore_patterns("*.sqlite*"))
    return open_with_live(FeatureCache.open(folder), live.tokenizer, sae=live.sae, model=live.model)


def test_an_explanation_made_now_is_there_after_a_restart(copied, opened):
    source, live = copied
    latent = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok")
    assert source.row(latent)["status"] == "not explained" and source.card(latent)["explanations"] == []
    found = live.call("explain", {"latent": latent})
    assert found["not_kept"] == "" and [one["explainer"] for one in found["explanations"]] == ["rules"]
    source.refresh()
    again = LatentSource(live.cache, live.tokenizer, sae=live.sae, model=live.model)  # as the static export reads it
    for one in (source, again):
        row, card = check("row", one.row(latent)), check_card(one.card(latent))
        assert row["explanation_it"] == found["explanations"][0]["text_it"] and row["status"] == "" and row["kind"]
        assert row["detection"] is not None and row["gain"] is not None
        assert [item["explainer"] for item in card["explanations"]] == ["rules", "token-lookup"]
        assert all(item["now"].endswith("Z") for item in card["explanations"])
        assert {score["explainer"] for score in card["scores"]} == {"rules", "token-lookup"} and card["rule"]


def test_a_folder_that_cannot_be_written_still_answers(copied, opened, monkeypatch):
    def refuse(path, *_):
        raise UsageError(f"{path} cannot be written now: attempt to write a readonly database.")

    source, live = copied
    latent = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok")
    monkeypatch.setattr("sae_italian.autointerp.store.connect", refuse)
    with FakeEndpoint(lambda body: '{"spiegazione": "parole"}') as endpoint:
        asked = Live(live.cache, live.sae, live.model, asking(endpoint))
        found = asked.explain(latent)
    assert "readonly" in found["not_kept"] and [one["status"] for one in found["explanations"]] == ["ok", "ok"]
    assert not (live.cache.folder / "autointerp.sqlite").exists()


def test_an_llms_explanation_made_now_is_kept_beside_the_rule(copied, opened):
    source, live = copied
    latent = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok")
    with FakeEndpoint(lambda body: '{"spiegazione": "parole femminili"}') as endpoint:
        Live(live.cache, live.sae, live.model, asking(endpoint)).explain(latent)
    source.refresh()
    assert source.row(latent)["llm_it"] == "parole femminili"
    kinds = [(item["kind"], item["explainer"]) for item in source.card(latent)["explanations"]]
    assert kinds[0] == ("rule", "rules") and kinds[1][0] == "llm" and kinds[-1] == ("rule", "token-lookup")


# --- passages as wide as their window -------------------------------------------------------------------------------------------


def test_wide_passages_are_the_same_ones_with_all_of_their_window(opened, active):
    source, _ = opened
    narrow, wide = source.card(active)["groups"], check("[group]", source.wide(active))
    assert [len(group["contexts"]) for group in narrow] == [len(group["contexts"]) for group in wide]
    longer = 0
    for own, whole in zip(narrow, wide, strict=True):
        for context, window in zip(own["contexts"], whole["contexts"], strict=True):
            text, around = ("".join(piece for piece, _ in one["segments"]) for one in (context, window))
            assert text in around and context["doc_id"] == window["doc_id"]
            assert max(value for _, value in window["segments"]) >= context["max"]
            assert context["max"] in [value for _, value in window["segments"]]
            longer += len(around) > len(text)
    assert longer
    for key in ("page.width.limit", "page.width.limit.disk"):
        assert f"{BEFORE} token prima di quello scelto e {AFTER} dopo" in label(key, "it")
        assert f"{BEFORE} tokens before the chosen one and {AFTER} after" in label(key, "en")
