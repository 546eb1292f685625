"""Records made from a real cache: the text is the documents' own, the numbers are the cache's."""

import json
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sae_italian.autointerp import AutointerpConfig, run_autointerp
from sae_italian.autointerp.store import Label, Store
from sae_italian.base.errors import DataError, UsageError
from sae_italian.browser import contexts, opening
from sae_italian.browser.contexts import FIRES, SEGMENT, SILENT, _in_one_line, borders_of, file_name, split_text
from sae_italian.browser.directions import Decoder
from sae_italian.browser.exports.latents import facts_of, names_of
from sae_italian.browser.opening import match_latents
from sae_italian.browser.page import records
from sae_italian.browser.source import LatentSource, labels_of, public_name
from sae_italian.browser.write import write_browser
from sae_italian.cache import FeatureCache, Manifest
from sae_italian.saes import load_sae
from tests.browser.data_files import read_data
from tests.browser.exports.test_others import a_card
from tests.browser.letters import letters
from tests.browser.schema import check, check_card, check_rows


@pytest.fixture(scope="module")
def cache(small_cache, tmp_path_factory) -> FeatureCache:
    return FeatureCache.open(shutil.copytree(small_cache, tmp_path_factory.mktemp("cards") / "cache"))


@pytest.fixture(scope="module")
def source(cache, mini, trained_sae):
    run_autointerp(cache, mini.tokenizer, AutointerpConfig(latents=60))
    return LatentSource(cache, mini.tokenizer, sae=load_sae(trained_sae), model=mini)


@pytest.fixture(scope="module")
def busiest(cache) -> int:
    return int(np.argmax(cache.statistics["count"]))


def test_every_record_fits_the_schema(source, cache):
    check("run", source.run())
    assert source.run()["n_documents"] == len(np.unique(cache.doc)) - 1 < cache.n_documents  # some were cut off
    rows = check_rows(source.rows())
    assert len(rows["latent"]) == 256 and sum(value is not None for value in rows["detection"]) > 20
    for latent in range(256):
        check_card(source.card(latent))


def test_contexts_are_true_text_with_the_caches_activations(source, cache, busiest):
    position, value = cache.latent(busiest)
    card = source.card(busiest)
    assert card["groups"][0]["contexts"][0]["max"] == pytest.approx(value.max())
    assert len(card["groups"]) == 11 and sum(len(group["contexts"]) for group in card["groups"]) == 30
    seen = set()
    for group in card["groups"]:
        for context in group["contexts"]:
            text = "".join(piece for piece, _ in context["segments"])
            index = next(i for i in range(cache.n_documents) if cache.document(i).doc_id == context["doc_id"])
            assert text in cache.document(index).text
            assert context["max"] in [activation for _, activation in context["segments"]]
            assert group["lo"] is None or group["lo"] <= context["max"] <= group["hi"]
            assert text not in seen
            seen.add(text)
    assert sum(card["histogram"]["counts"]) == len(position)


def test_each_tenth_of_the_activity_has_its_own_passages(source, busiest):
    """The strongest activation of a passage may lie beside its peak, in a stretch of another tenth, so it is a bound."""
    groups = source.card(busiest)["groups"][1:]
    bounds = [(group["lo"], group["hi"]) for group in groups]
    assert all(lo <= hi for lo, hi in bounds)
    assert all(above[0] >= below[1] for above, below in zip(bounds[:-1], bounds[1:], strict=True))
    assert all(context["max"] >= group["lo"] for group in groups for context in group["contexts"])


def test_every_activation_of_a_passage_is_marked(source, cache, busiest):
    """A passage counts as many active characters as the cache has active tokens there."""
    position, _ = cache.latent(busiest)
    context = source.card(busiest)["groups"][0]["contexts"][0]
    text = "".join(piece for piece, _ in context["segments"])
    index = next(i for i in range(cache.n_documents) if cache.document(i).doc_id == context["doc_id"])
    first = cache.document(index).text.index(text)
    here = position[cache.doc[position] == index]
    start, end = cache.gather("start", here), cache.gather("end", here)
    inside = (start >= first) & (end <= first + len(text))
    letters = sum(len(piece) for piece, activation in context["segments"] if activation > 0)
    assert letters == (end - start)[inside].sum()


def test_neighbours_sources_and_places_are_the_caches(source, cache, busiest):
    card, stats = source.card(busiest), cache.statistics
    assert [n["latent"] for n in card["decoder"]] == stats["decoder_ids"][busiest].tolist()
    assert [n["value"] for n in card["cofiring"]] == stats["cofiring_jaccard"][busiest].tolist()
    assert sum(card["positions"]) == pytest.approx(1)
    assert sum(s["documents"] for s in card["sources"]) == stats["n_documents"][busiest]
    assert sum(s["tokens"] for s in card["sources"]) == stats["count"][busiest]


def test_logits_are_counted_over_the_whole_vocabulary(source, cache, mini, busiest):
    card = source.card(busiest)
    assert sum(card["logits"]["counts"]) == mini.get_output_embeddings().weight.shape[0]
    largest, smallest = (
        cache.statistics["promoted_values"][busiest][0],
        cache.statistics["suppressed_values"][busiest][0],
    )
    assert card["logits"]["edges"][-1] == pytest.approx(largest, rel=1e-4)
    assert card["logits"]["edges"][0] == pytest.approx(smallest, rel=1e-4)


def test_a_decoder_matches_itself_and_its_shuffled_copy(trained_sae):
    import torch

    decoder = Decoder(load_sae(trained_sae))

    def source_of(decoder) -> Any:
        return SimpleNamespace(decoder=decoder)

    order = torch.randperm(len(decoder.directions), generator=torch.Generator().manual_seed(0))
    shuffled = Decoder(SimpleNamespace(W_dec=3 * decoder.directions[order]))
    found = match_latents(*map(source_of, (shuffled, decoder)))
    assert found["latent"] == order.tolist() and found["cosine"] == pytest.approx([1] * len(order), abs=1e-4)
    assert found["back"] == torch.argsort(order).tolist()
    assert np.abs(decoder.plane).max() == pytest.approx(1)
    with pytest.raises(UsageError, match="only SAEs of one model"):
        match_latents(source_of(decoder), source_of(Decoder(SimpleNamespace(W_dec=torch.ones(3, 5)))))


def test_an_llms_explanation_and_its_judge_stand_beside_the_rule(source, cache):
    from sae_italian.autointerp.store import Explanation

    latent = next(iter(source.scores["rules", "detection"]))
    with Store(source.store_path, {}) as store:
        store.add_explanations([Explanation(latent, "llm:prova:it1", "ok", "plurale femminile", "", None, "llm")])
        number = store.explanations("llm:prova:it1")[latent].id
        store.add_scores(
            [(number, latent, "", "detection", "prova", "random", "balanced_accuracy", 0.9, 0.8, 0.95, 20, 20, 0)]
        )
    source.refresh()
    card, row = source.card(latent), source.row(latent)
    assert [e["explainer"] for e in card["explanations"]] == ["rules", "llm:prova:it1", "token-lookup"]
    assert {(s["explainer"], s["judge"]) for s in card["scores"]} >= {
        ("llm:prova:it1", "prova"),
        ("token-lookup", "rule"),
    }
    assert row["llm_it"] == "plurale femminile" and row["explanation_it"] != row["llm_it"]


def test_the_whole_rules_score_stands_beside_the_texts(source):
    where = {"scorer": "detection", "negatives": "random", "metric": "balanced_accuracy"}
    with Store(source.store_path, {}) as store:
        whole = store.values(explainer="rules", control="whole rule", **where)
    assert whole and all(source.row(latent)["whole_detection"] == value for latent, value in whole.items())
    (control,) = records({"autointerp": {"whole_detection": {"value": 0.83, "lo": 0.8, "hi": 0.86}}}, "controls")
    assert (control["name"], control["value"], control["lo"]) == ("whole_detection", 0.83, 0.8)
    assert control["label_it"].startswith("Regole intere")


def test_several_threads_may_ask(source, busiest):
    """A server answers from many threads, and SQLite's connections do not change threads."""
    expected, found = source.card(busiest), []
    threads = [threading.Thread(target=lambda: found.append(source.card(busiest))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_a_latent_that_never_fired_has_an_empty_card(silent_latent, mini):
    folder, sae, latent = silent_latent
    source = LatentSource(FeatureCache.open(folder), mini.tokenizer, sae=sae, model=mini)
    card, row = source.card(latent), source.row(latent)
    assert row["dead"] and card["groups"] == [] and card["histogram"] == {"edges": [], "counts": []}
    assert card["positions"] == [] and card["sources"] == [] and card["promoted"]


@given(
    text=st.text(min_size=1, max_size=40),
    cuts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 9)), max_size=12),
)
def test_split_text_loses_no_character(text, cuts):
    spans = np.array([[min(a, b, len(text)), min(max(a, b), len(text))] for a, b, _ in cuts], dtype=int).reshape(-1, 2)
    pieces = split_text(text, spans, np.array([value for *_, value in cuts]))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(piece for piece, _ in pieces)


def test_a_letter_of_several_byte_tokens_shows_once_with_the_strongest():
    pieces = split_text("a🙂b", np.array([[0, 1], [1, 2], [1, 2], [1, 2], [2, 3]]), np.array([0, 1.0, 3.0, 2.0, 0]))
    assert pieces == [("a", 0.0), ("🙂", 3.0), ("b", 0.0)]


def test_the_saes_card_is_shown_where_the_cache_has_no_results(small_cache, trained_sae, mini, tmp_path):
    sae = shutil.copytree(trained_sae, tmp_path / "sae", ignore=shutil.ignore_patterns("card.*"))
    folder = shutil.copytree(
        small_cache, tmp_path / "cache", ignore=shutil.ignore_patterns("*.sqlite*", "results.json")
    )
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8")) | {"sae": str(sae)}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    bare = FeatureCache.open(folder)
    assert LatentSource(bare, mini.tokenizer).run()["metrics"] == []
    a_card().save(sae)
    metrics = {metric["name"]: metric["value"] for metric in LatentSource(bare, mini.tokenizer).run()["metrics"]}
    assert metrics["l0"] == 0.5 and metrics["explained_variance"] == 50.0 and metrics["dead"] == 50.0


def test_a_cache_without_explanations_still_has_a_report(small_cache, mini, tmp_path):
    bare = FeatureCache.open(
        shutil.copytree(small_cache, tmp_path / "bare", ignore=shutil.ignore_patterns("*.sqlite*", "results.json"))
    )
    index = write_browser(tmp_path / "report", LatentSource(bare, mini.tokenizer))
    rows = read_data(index.parent / "data" / "rows" / "0000.js")
    assert set(rows["status"]) == {"not explained"} and set(rows["x"]) == {None}


@pytest.mark.parametrize("text", ["{broken", "[]", '{"gold": 5}', '{"card": {"l0": 3}}', '{"card": 7}'])
def test_results_that_are_cut_short_are_named(explained, mini, tmp_path, text):
    folder = shutil.copytree(explained.folder, tmp_path / "cache")
    (folder / "results.json").write_text(text)
    with pytest.raises(DataError, match="results.json is no run's results"):
        LatentSource(FeatureCache.open(folder), mini.tokenizer)


def test_peaks_are_the_strongest_of_every_stretch(source, cache, busiest):
    latent = cache.latent(busiest)
    run = cache.gather("run", latent.position)
    context = cache.manifest.context_size
    stretch = latent.position - (latent.position % context - run) % SEGMENT
    best = {}
    for where, position, value in zip(stretch.tolist(), latent.position.tolist(), latent.value.tolist(), strict=True):
        if where not in best or value > best[where][1]:
            best[where] = (position, value)
    peaks = latent.peaks(SEGMENT)
    assert len(best) > 50 and set(zip(peaks.position.tolist(), peaks.value.tolist(), strict=True)) == set(best.values())
    assert (np.diff(peaks.value) <= 0).all()


def test_what_stands_at_positions_does_not_depend_on_their_order(cache):
    position = np.random.default_rng(0).choice(cache.n_positions, 500)
    for where in (position, np.sort(position), position[:0]):
        tokens, doc = cache.gather("tokens", where), cache.gather("doc", where)
        assert (tokens == cache.tokens[where]).all() and (doc == cache.doc[where]).all()


def test_no_path_of_this_machine_is_published_nor_need_it_be_there(cache, source, mini, tmp_path):
    folder = shutil.copytree(cache.folder, tmp_path / "cache", ignore=shutil.ignore_patterns("*.sqlite*"))
    text = (folder / "manifest.json").read_text(encoding="utf-8")
    named = json.loads(text) | {"model": "/home/io/modelli/ita-5m", "corpus": "/home/io/testi", "sae": "/home/io/sae"}
    (folder / "manifest.json").write_text(json.dumps(named), encoding="utf-8")
    opened = FeatureCache.open(folder)
    page = LatentSource(opened, mini.tokenizer).run()
    hook = opened.manifest.hook_name
    assert (page["title"], page["model"], page["corpus"]) == (f"ita-5m · {hook}", "ita-5m", "testi")
    assert "/home/io" not in json.dumps([page, facts_of(opened.manifest, names_of(opened.manifest))])
    assert source.run()["model"] == "sae-italian-mini"


def test_only_the_sources_with_most_documents_are_listed(source, busiest, monkeypatch):
    every = source.card(busiest)
    assert every["more_sources"] == 0 and len(every["sources"]) > 1
    monkeypatch.setattr("sae_italian.browser.source.N_SOURCES", 1)
    card = source.card(busiest)
    assert card["sources"] == every["sources"][:1] and card["more_sources"] == len(every["sources"]) - 1


def test_a_passage_ends_with_its_sentence_or_at_a_word():
    text = "Fine. La ragazza vide il mare. E poi il cielo stellato sopra"
    peak = text.index("mare")

    def cut(low, begin, end, high):
        start, stop, what = borders_of(text, low, begin, peak, peak + 4, end, high)
        return text[start:stop], what

    assert cut(0, 12, 30, len(text)) == ("La ragazza vide il mare.", 0)
    assert cut(10, 12, 29, 29) == (
        "vide il mare",
        3,
    )  # of «ragazza» and of the sentence there is no more to choose from
    assert cut(0, 0, 40, 48) == ("Fine. La ragazza vide il mare. E poi il cielo", 2)
    assert cut(0, 0, 42, 44) == ("Fine. La ragazza vide il mare. E poi il", 2)  # «cielo» goes on
    assert cut(0, 0, len(text), len(text)) == (text, 0)
    assert borders_of("Prima.\n\nPoi", 0, 6, 6, 8, 8, 11)[0] <= 6  # what fires is never cut off


@pytest.mark.parametrize(
    "text, word, wanted",
    [
        ("Ecco. La Rossi S.p.A. di Milano chiude. Poi", "p", "La Rossi S.p.A. di Milano chiude."),
        ("Ecco. Lo dice l'art. 3 del codice. Poi", "3", "Lo dice l'art. 3 del codice."),
        ("Ecco. Apri il file todo.type.ts e salva. Poi", "ts", "Apri il file todo.type.ts e salva."),
        ("Ecco. «Vuole altro?», chiede Anna. Poi", ",", "«Vuole altro?», chiede Anna."),
        ("Ecco. «Vuole altro?» chiede Anna. Poi", "»", "«Vuole altro?» chiede Anna."),
        ("Ecco.  La pagina\n\nPoi", "pagina", "La pagina"),
        ("Ecco. Lo disse l'on. Moro al sig. G. Verdi. Poi", "Moro", "Lo disse l'on. Moro al sig. G. Verdi."),
        ("Ecco. È della Rossi S.p.A. Poi", "Rossi", "È della Rossi S.p.A."),
        ("Ecco. Il prof. (Dott. Neri) è qui. Poi", "Neri", "Il prof. (Dott. Neri) è qui."),
    ],
)
def test_a_full_stop_inside_a_sentence_does_not_end_it(text, word, wanted):
    """Wherever the tokens shown begin and end: an abbreviation, a file's name, a quotation that goes on."""
    peak = text.index(word)
    end = peak + len(word)
    for begin in range(6, peak + 1):
        start, stop, what = borders_of(text, 0, begin, peak, end, end, len(text))
        assert (text[start:stop], what) == (wanted, 0), begin
    for high in range(end, text.index("Poi") - 1 - text.count("\n")):  # fewer tokens than the sentence has: at a word
        start, stop, what = borders_of(text, 0, 6, peak, end, end, high)
        assert (text[start:stop] == wanted) == (what == 0), high
    segments = [(text[:peak], 0.0), (text[peak:end], 2.0), (text[end:], 0.0)]
    plain = _in_one_line({"segments": segments, "cut": 3, "max": 2.0}).replace(FIRES, "").replace(SILENT, "")
    assert plain == wanted


def test_the_page_knows_the_same_abbreviations():
    script = (Path(contexts.__file__).parent / "static" / "contexts.js").read_text(encoding="utf-8")
    (theirs,) = re.findall(r'const SHORTENED = "(.+)";', script)
    assert [re.sub(r"^\[(.)(.)\]", r"\2", each) for each in theirs.split("|")] == contexts._SHORT.split()


def test_every_alive_latent_has_one_real_sentence(source):
    rows = source.rows()
    for latent, sample in zip(rows["latent"], rows["sample"], strict=True):
        assert bool(sample) == (rows["n_active"][latent] > 0) and sample == source.sample(latent)
        if sample:
            assert FIRES in sample and sample.count(FIRES) == sample.count(SILENT)
            plain = sample.replace(FIRES, "").replace(SILENT, "").removeprefix("… ").removesuffix("…")
            card = source.card(latent) if latent % 32 == 0 else None
            assert card is None or plain.split()[0] in "".join(
                t for t, _ in card["groups"][0]["contexts"][0]["segments"]
            )


@pytest.mark.parametrize(
    "source, shown", [("/home/ugo/testi/a.txt", "a.txt"), ("C:\\testi\\b.jsonl", "b.jsonl"), ("wiki", "wiki"), ("", "")]
)
def test_a_source_is_told_by_its_file_name(source, shown):
    assert file_name(source) == shown and file_name("uonlp/CulturaX") == "uonlp/CulturaX"


def test_a_card_of_another_sae_trained_in_the_same_folder_is_not_shown(small_cache, mini, trained_sae, tmp_path):
    trained = shutil.copytree(trained_sae, tmp_path / "sae")
    (trained / "seeds.json").write_text(json.dumps({"found": [2] * 256, "seeds": [0, 1]}))
    made = FeatureCache(small_cache, Manifest.load(small_cache).model_copy(update={"sae": str(trained)}))
    assert LatentSource(made, mini.tokenizer).card(0)["seeds"] == {"found": 2, "of": 2}
    weights = load_file(trained / "sae_weights.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, trained / "sae_weights.safetensors")
    assert LatentSource(made, mini.tokenizer).card(0)["seeds"] is None


# --- by meaning ---------------------------------------------------------------------------------------------------------


def test_the_nearest_by_meaning_are_those_of_explanation_or_passage(source, cache, mini, monkeypatch):
    """With vectors of letters: a latent's own title, and its own passage, find it first; the vectors are kept and renewed."""
    asked: list[int] = []
    monkeypatch.setattr(opening, "encode", lambda texts, name: asked.append(len(texts)) or letters(texts, name))
    rows = source.rows()
    said = zip(*(rows[name] for name in ("title_it", "explanation_it", "llm_it")), strict=True)
    told = [" ".join(filter(None, one)) for one in said]
    latent = next(i for i, text in enumerate(told) if text)
    for text in (told[latent], rows["sample"][latent].replace(FIRES, "").replace(SILENT, "")):
        best = opening.nearest_in_meaning(source, "letters", text)
        same = [one["latent"] for one in best if one["cosine"] > 0.9999]
        assert latent in same and [one["cosine"] for one in best] == sorted((o["cosine"] for o in best), reverse=True)
    assert asked == [512, 1, 1]  # both texts of 256 latents once, then the sentences
    assert opening.nearest_in_meaning(source, "letters", "x") and asked[3:] == [1]
    assert opening.nearest_in_meaning(source, "others", "x") and asked[4:] == [512, 1]  # another encoder's
    monkeypatch.setattr(opening, "atomic_path", lambda _: (_ for _ in ()).throw(PermissionError("read only")))
    assert opening.nearest_in_meaning(source, "letters", "x"), "another user's cache keeps no vectors"
    dead = int(np.argmin(cache.statistics["count"]))
    assert cache.statistics["count"][dead] == 0 and not opening.meaning_vectors(source, "letters")[:, dead].any()


def test_a_real_encoder_is_read_from_a_folder(tmp_path):
    model2vec = pytest.importorskip("model2vec", reason="needs the meaning extra")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "gatto", "micio", "treno"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array([[0, 0, 0.1], [1, 0, 0], [0.9, 0.1, 0], [0, 1, 0]], dtype=np.float32)
    model2vec.StaticModel(vectors=vectors, tokenizer=tokenizer).save_pretrained(str(tmp_path / "encoder"))
    found = opening.encode(["gatto", "micio", "treno"], str(tmp_path / "encoder"))
    assert found.shape == (3, 3) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found[0] @ found[1] > 0.9 > 0.2 > found[0] @ found[2]
    with pytest.raises(UsageError, match="nowhere"):
        opening.encode(["gatto"], str(tmp_path / "nowhere"))


def test_of_several_corpora_every_name_is_told(tmp_path):
    for name in ("leggi.jsonl", "a,b.jsonl"):
        (tmp_path / name).touch()
    for weighted in (
        "{}/leggi.jsonl,/elsewhere/novelle.txt,micro-italiano",
        "0.5*{}/leggi.jsonl, 0.3*/x/novelle.txt,0.2*micro-italiano",
    ):
        assert public_name(weighted.format(tmp_path)) == "leggi.jsonl, novelle.txt, micro-italiano"
    assert public_name(f"{tmp_path}/a,b.jsonl") == "a,b.jsonl"


def test_without_the_extra_a_search_by_meaning_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(UsageError, match=r"sae-italian\[meaning\]"):
        opening.encode(["gatto"], "minishlab/potion-multilingual-128M")


def test_a_label_that_fails_elsewhere_follows_where_it_holds():
    gold = {"category": "x", "n": 9, "precision": 1.0, "recall": 1.0}
    rows = [
        Label(3, "Number=Plur", "EN", 0.7, 0.6, 0.8, 0.7, 0.7, 9),
        Label(3, "Number=Plur", "IT", 0.1, 0.0, 0.2, 0.1, 0.1, 9),
    ]
    store = SimpleNamespace(labels=lambda: rows)
    found = labels_of(store, [{**gold, "label": "UPOS=NOUN", "latent": 3, "f1": 0.6}])  # pyright: ignore[reportArgumentType]
    assert [(row["label"], row["source"]) for row in found[3]] == [
        ("Number=Plur", "EN"),
        ("Number=Plur", "IT"),
        ("UPOS=NOUN", "gold"),
    ]
