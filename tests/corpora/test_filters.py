"""Language, duplicates and near duplicates, on sentences whose answer is known."""

import json
import random

import numpy as np
import pytest

from sae_italian.base.errors import UsageError
from sae_italian.corpora.filters import BloomFilter, Sieve, is_italian
from sae_italian.corpora.stream import CorpusStream, Reader

pytest.importorskip("py3langid")
pytest.importorskip("datasketch")

OTHERS = {
    "es": "La ciudad estaba tranquila por la mañana, pero los niños ya jugaban en la calle con sus amigos.",
    "fr": "La ville était calme ce matin, mais les enfants jouaient déjà dans la rue avec leurs amis.",
    "pt": "A cidade estava calma de manhã, mas as crianças já brincavam na rua com os seus amigos.",
    "ro": "Orașul era liniștit dimineața, dar copiii se jucau deja pe stradă cu prietenii lor.",
    "ca": "La ciutat estava tranquil·la al matí, però els nens ja jugaven al carrer amb els seus amics.",
    "en": "The city was quiet in the morning, but the children were already playing in the street.",
    "de": "Die Stadt war am Morgen ruhig, aber die Kinder spielten schon auf der Straße.",
    "la": "Gallia est omnis divisa in partes tres, quarum unam incolunt Belgae, aliam Aquitani.",
}
ITALIAN = [
    "La città era tranquilla al mattino, ma i bambini giocavano già per strada con i loro amici.",
    "Perché l'università dell'Aquila ha rinviato l'esame? Nessuno lo sa ancora.",
    "Art. 3 Tutti i cittadini hanno pari dignità sociale e sono eguali davanti alla legge.",
    "Quel ramo del lago di Como, che volge a mezzogiorno, tra due catene non interrotte di monti.",
]


def words(n: int, seed: int) -> list[str]:
    return [f"parola{random.Random(f'{seed}/{i}').randrange(5000)}" for i in range(n)]


def changed(text: list[str], share: float, seed: int) -> str:
    pick = random.Random(seed)
    return " ".join(f"altro{pick.random()}" if pick.random() < share else word for word in text)


def test_italian_is_told_from_its_neighbours():
    assert all(is_italian(text) for text in ITALIAN) and is_italian("Sì.")
    assert [code for code, text in OTHERS.items() if is_italian(text)] == []


def test_near_duplicates_are_found_and_different_texts_are_kept():
    near = Sieve(Reader(near_duplicates=True, capacity=10_000)).reason_against
    texts = [words(200, seed) for seed in range(200)]
    assert not any(near(" ".join(text)) for text in texts)
    slightly = [near(changed(text, 0.01, i)) for i, text in enumerate(texts)]  # Jaccard about 0.9
    assert np.mean([reason == "near_duplicate" for reason in slightly]) > 0.95
    largely = [near(changed(text, 0.3, i)) for i, text in enumerate(texts)]  # Jaccard about 0.1
    assert np.mean([reason is not None for reason in largely]) < 0.02


def test_a_bloom_filter_forgets_and_does_not_grow():
    bloom = BloomFilter(1000)
    keys = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
    size = sum(g.nbytes for g in bloom.generations)
    assert not any(bloom.seen(key[None]) for key in keys)
    assert sum(g.nbytes for g in bloom.generations) == size < 8000
    assert all(bloom.seen(key[None]) for key in keys[-1000:])  # never forgotten before `capacity` more
    assert not bloom.seen(keys[:1])


def test_the_stated_memory():
    for capacity, mebibytes in ((1_000_000, 7), (14_000_000, 96)):
        assert 2 * BloomFilter(capacity).n_bytes / 2**20 == pytest.approx(mebibytes, abs=0.6)


def test_every_drop_has_its_reason(tmp_path):
    long = " ".join(words(100, 1))
    texts = [
        ITALIAN[0],
        ITALIAN[0] + " ",
        OTHERS["es"],
        "Breve.",
        f"È {long}.",
        f"È {long}. Fine della pagina.",
        ITALIAN[3],
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    reader = Reader(min_chars=10, italian=False, duplicates=True, near_duplicates=True)
    stream = CorpusStream(file, reader)
    assert [d.text for d in stream] == [texts[0], texts[2], texts[4], texts[6]]
    assert stream.counts.dropped == {"duplicate": 1, "too_short": 1, "near_duplicate": 1}
    stream = CorpusStream(file, Reader(italian=True))
    assert OTHERS["es"] not in [d.text for d in stream] and stream.counts.dropped["not_italian"] >= 1


def test_what_was_seen_is_resumed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(words(60, i % 40))}) + "\n" for i in range(80)))
    reader = Reader(duplicates=True, near_duplicates=True)
    whole = [d.doc_id for d in CorpusStream(file, reader)]
    assert len(whole) == 40
    first = CorpusStream(file, reader)
    begun = [next(first).doc_id for _ in range(25)]
    first.sieve.save(tmp_path / "seen.npz")
    second = CorpusStream(file, reader)
    second.load_state(first.state())
    second.sieve.load(tmp_path / "seen.npz")
    assert begun + [d.doc_id for d in second] == whole
    assert second.counts.as_dict()["dropped"] == {"duplicate": 40}


def test_settings_out_of_range():
    with pytest.raises(UsageError, match="capacity is 0; it must be 1 or more"):
        Sieve(Reader(capacity=0))
    with pytest.raises(UsageError, match="min_chars is -1"):
        Reader(min_chars=-1)
