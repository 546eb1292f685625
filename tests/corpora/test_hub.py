"""Corpora of the hub through a local stand-in with the real layouts, and everything a network can do to them."""

import hashlib
import json
import threading

import huggingface_hub.constants
import pytest

from sae_italian.base.errors import DataError, UsageError
from sae_italian.corpora import catalogue
from sae_italian.corpora.stream import CorpusStream, Reader, load_corpus
from tests.corpora import hub_stand_in
from tests.corpora.hub_stand_in import gz, jsonl, parquet

MC4, WIKI = "gsarti/clean_mc4_it", "wikimedia/wikipedia"


def rows(name: str, n: int = 30) -> list[dict]:
    return [
        {"text": f"{name}, riga {i}: la città è bella. " + "parola " * 40, "url": f"http://x/{i}"} for i in range(n)
    ]


def layouts() -> dict[str, dict[str, bytes]]:
    """Return each repository with the files that the catalogue expects, and some it must leave alone."""
    mc4 = {f"clean_mc4_it/c4-it.tfrecord-{i:05d}-of-01024.json.gz": gz(jsonl(rows(f"mc4-{i}"))) for i in range(4)}
    mc4["clean_mc4_it/c4-it-validation.tfrecord-00000-of-00008.json.gz"] = gz(jsonl(rows("mc4-val")))
    mc4 |= {f"tiny/partial-train/{i:04d}.parquet": parquet(rows(f"mc4p-{i}")) for i in range(2)}
    mc4["clean_mc4_it.py"] = b"raise SystemExit"
    books = [parquet([{"text": f"libro {i}" * 50, "word_count": n}]) for i, n in ((0, 3), (1, "tre"))]
    pairs = [{"translation": {"en": f"The house {i}.", "it": f"La casa {i}."}} for i in range(5)]
    return {
        MC4: mc4,
        WIKI: {f"20231101.it/train-{i:05d}-of-00003.parquet": parquet(rows(f"wiki-{i}")) for i in range(3)}
        | {"20231101.en/train-00000-of-00001.parquet": parquet(rows("english"))},
        "HuggingFaceFW/fineweb-2": {
            "data/ita_Latn/train/000_00000.parquet": parquet(rows("fw")),
            "data/ita_Latn/test/000_00000.parquet": parquet(rows("fw-test")),
            "data/ita_Latn_removed/train/000_00000.parquet": parquet(rows("fw-removed")),
        },
        "HPLT/HPLT2.0_cleaned": {"ita_Latn/train-00000.parquet": parquet(rows("hplt"))},
        "PleIAs/Italian-PD": {f"italian_pd_{i}.parquet": book for i, book in enumerate(books)},
        "g8a9/europarl_en-it": {"data/train-00000-of-00002.parquet": parquet(pairs)},
        "commul/universal_dependencies": {
            "it_isdt/train-00000-of-00001.parquet": parquet(rows("isdt")),
            "it_vit/train-00000-of-00001.parquet": parquet(rows("vit")),
            "en_ewt/train-00000-of-00001.parquet": parquet(rows("ewt")),
        },
        "uonlp/CulturaX": {"it/it_part_00000.parquet": parquet(rows("cx")), "en/en_part_00000.parquet": b""},
        "oscar-corpus/OSCAR-2301": {"it_meta/it_meta_part_1.jsonl.gz": gz(jsonl([{"content": "Ciao a tutti."}]))},
    }


@pytest.fixture
def server(monkeypatch):
    stand_in = hub_stand_in.Hub()
    stand_in.repositories = layouts()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        stand_in.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", stand_in.url, raising=False)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", stand_in.url)
    monkeypatch.setattr("datasets.config.STREAMING_READ_MAX_RETRIES", 2)
    stand_in.waits = []  # the waits between tries, in seconds
    monkeypatch.setattr("time.sleep", stand_in.waits.append)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
    yield stand_in
    stand_in.close()
    huggingface_hub.close_session()


def texts(corpus, **settings) -> list[str]:
    return [document.text for document in CorpusStream(corpus, Reader(**settings))]


@pytest.mark.parametrize(
    ("name", "n", "begins"),
    [
        ("fineweb-2-it", 30, "fw,"),
        ("wikipedia-it", 90, "wiki-"),
        ("clean-mc4-it-tiny", 120, "mc4-"),
        ("clean_mc4_it@raw", 120, "mc4-"),
        ("clean-mc4-it-tiny@parquet", 60, "mc4p-"),
        ("hplt-it", 30, "hplt"),
        ("italian-pd", 2, "libro"),
        ("europarl-en-it", 5, "La casa"),
        ("europarl-en-it@english", 5, "The house"),
        ("ud-italian", 30, "isdt"),
        ("ud-italian@vit", 30, "vit"),
        ("culturax-it", 30, "cx"),
        ("oscar-it", 1, "Ciao a tutti."),
        ("hf://datasets/wikimedia/wikipedia@main/20231101.en/*.parquet", 30, "english"),
    ],
)
def test_every_corpus_of_the_catalogue_is_read_by_its_route(server, name, n, begins):
    found = texts(name)
    assert len(found) == n and all(text.startswith(begins) for text in found)


def test_sizes_of_clean_mc4_are_prefixes_of_the_raw_shards(server):
    _, route = catalogue.find("clean-mc4-it-tiny") or pytest.fail()
    names = list(catalogue.list_files(route | {"first": 2}, "x")[1])
    assert len(names) == 2 and names == sorted(names) and not any("validation" in name for name in names)
    firsts = [
        catalogue.catalogue()[f"clean-mc4-it-{size}"]["routes"]["raw"]["first"]
        for size in ("tiny", "small", "medium", "large", "full")
    ]
    assert firsts == [100, 200, 500, 750, None]


def test_shard_order_is_the_seeds_and_rows_keep_theirs(server):
    first, again, other = (texts("wikipedia-it", seed=seed) for seed in (0, 0, 2))
    assert first == again and sorted(first) == sorted(other) and first != other
    assert len({text.split(",")[0] for text in first[:30]}) == 1  # one shard, whole


@pytest.mark.parametrize("fault", ["drop", "reset", "429:0", "500", "503:0.01", "502"])
@pytest.mark.parametrize("name", ["clean-mc4-it-tiny", "wikipedia-it"])
def test_faults_of_the_network_lose_and_repeat_nothing(server, name, fault):
    whole = texts(name)
    repository = server.repositories[MC4 if "mc4" in name else WIKI]
    for path in repository:
        for _ in range(3):
            server.fault(path, fault)
            server.fault(path, "")
    assert texts(name) == whole
    assert sum(waiting.count(fault) for waiting in server.faults.values()) < 3 * len(repository)  # faults were met


def test_retry_after_is_waited_for(server):
    server.fault("20231101.it/train-00000-of-00003.parquet", "429:7")
    texts("wikipedia-it")
    assert any(7 <= wait < 9 for wait in server.waits)


def test_a_network_that_stays_down_is_one_line_after_the_tries(server):
    server.fault("20231101.it/train-00001-of-00003.parquet", "503", 50)
    with pytest.raises(UsageError, match=r"cannot be read, after several tries.*resumed run goes on") as error:
        texts("wikipedia-it")
    assert "\n" not in str(error.value) and len(server.waits) > 3


def test_no_server_at_all(server):
    server.close()
    with pytest.raises(UsageError, match="Check the network"):
        texts("wikipedia-it")


def test_a_gated_corpus_says_what_to_do(server):
    server.gated.add("uonlp/CulturaX")
    with pytest.raises(
        UsageError, match=r"is gated: accept its terms at https://huggingface.co/datasets/uonlp/CulturaX.*HF_TOKEN"
    ):
        texts("culturax-it")
    server.fault("api", "403")
    with pytest.raises(UsageError, match="Corpora without a gate: fineweb-2-it"):
        texts("oscar-it")


def test_names_and_revisions_the_hub_does_not_have(server):
    del server.repositories[WIKI]
    with pytest.raises(UsageError, match="corpus 'wikipedia-it' is not on the hub"):
        texts("wikipedia-it")
    server.revisions.discard("refs/convert/parquet")
    with pytest.raises(UsageError, match="no revision 'refs/convert/parquet'"):
        texts("clean-mc4-it-tiny@parquet")
    server.repositories["HuggingFaceFW/fineweb-2"] = {"README.md": b""}
    with pytest.raises(UsageError, match="layout has changed"):
        texts("fineweb-2-it")
    with pytest.raises(UsageError, match="route 'tfrecord' is unknown"):
        texts("clean-mc4-it-tiny@tfrecord")
    with pytest.raises(UsageError, match="Did you mean 'wikipedia-it'"):
        texts("wikipedia-itt")


def test_offline_says_so(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        texts("wikipedia-it")


def test_a_truncated_gz_is_refused_or_skipped_and_its_rows_are_kept(server):
    path = "clean_mc4_it/c4-it.tfrecord-00001-of-01024.json.gz"
    content = gz(jsonl([{"text": f"{i} " + str(hash(str(i)))} for i in range(3000)]))
    server.repositories[MC4][path] = content[: len(content) // 2]
    with pytest.raises(DataError, match=r"00001-of-01024.json.gz ends early.*resume, or skip it \(on_broken=skip"):
        texts("clean-mc4-it-tiny")
    stream = CorpusStream("clean-mc4-it-tiny", Reader(on_broken="skip"))
    kept = list(stream)
    assert stream.counts.dropped == {"truncated_shard": 1} and 90 < len(kept) < 3090 and stream.counts.kept == len(kept)


def test_a_shard_that_disappears(server):
    def stream_until_gone(reader):
        stream = CorpusStream("wikipedia-it", reader)
        read = [next(stream)]
        gone = stream.parts[0].shards[1].name  # pyright: ignore
        server.repositories[WIKI].pop(gone)
        return stream, read, gone

    stream, _, gone = stream_until_gone(Reader())
    with pytest.raises(DataError, match=rf"{gone} disappeared while it was read.*on_broken=skip"):
        list(stream)
    server.repositories = layouts()
    stream, read, _ = stream_until_gone(Reader(on_broken="skip"))
    assert len(read + list(stream)) == 60 and stream.counts.dropped == {"shard_gone": 1}


def test_a_shard_of_another_schema(server):
    path = "20231101.it/train-00002-of-00003.parquet"
    server.repositories[WIKI][path] = parquet([{"text": 3}])
    with pytest.raises(DataError, match="column 'text' holds int64, strings were expected"):
        texts("wikipedia-it")
    server.repositories[WIKI][path] = parquet([{"testo": "ciao"}])
    huggingface_hub.HfFileSystem.clear_instance_cache()  # it remembers the size the file had, as a commit's do not change
    with pytest.raises(UsageError, match="has no column 'text'; it has 'testo'"):
        texts("wikipedia-it")
    stream = CorpusStream("wikipedia-it", Reader(on_broken="skip"))
    assert len(list(stream)) == 60 and stream.counts.dropped == {"other_schema": 1}


@pytest.mark.parametrize(
    "name", ["clean-mc4-it-tiny", "wikipedia-it", "0.6*wikipedia-it,0.4*clean-mc4-it-tiny@parquet"]
)
@pytest.mark.parametrize("taken", [1, pytest.param(29, marks=pytest.mark.slow), 47])
def test_a_resumed_stream_repeats_and_loses_nothing(server, name, taken):
    whole = texts(name, split="train", seed=5)
    first = CorpusStream(name, Reader(split="train", seed=5))
    begun = [next(first).text for _ in range(taken)]
    state = json.loads(json.dumps(first.state()))
    second = CorpusStream(name, Reader(split="train", seed=5))
    second.load_state(state)
    assert begun + [document.text for document in second] == whole
    assert second.counts.kept == len(whole)


def test_row_groups_before_the_cursor_are_not_fetched(server):
    noise = [{"text": " ".join(hashlib.sha256(f"{i}/{j}".encode()).hexdigest() for j in range(40))} for i in range(500)]
    server.repositories["a/b"] = {"x.parquet": parquet(noise)}  # 50 row groups
    stream = CorpusStream("hf://datasets/a/b/*.parquet", Reader())
    stream.load_state(stream.state() | {"parts": [{"shard": "x.parquet", "row": 455}]})
    assert [document.text for document in stream] == [row["text"] for row in noise[455:]]
    size = len(server.repositories["a/b"]["x.parquet"])
    early = [first for _, first, _ in server.ranges if first < size * 0.7]  # the footer and its surroundings apart
    assert server.ranges and not early


def test_load_corpus_over_the_hub_gives_uniform_rows(server):
    found = list(load_corpus("wikipedia-it", limit=10))
    assert [set(row) for row in found] == [{"text", "doc_id", "source"}] * 10
    assert found[0]["doc_id"].startswith("20231101.it/train-") and found[0]["source"] == "wikipedia-it"
    shuffled = load_corpus("wikipedia-it").shuffle(seed=0, buffer_size=50)
    assert sorted(row["text"] for row in shuffled) == sorted(texts("wikipedia-it", split="train"))


def test_the_connection_is_not_shared_between_reads(server):
    """Two readers of one file at a time get their own bytes."""
    path = "20231101.it/train-00000-of-00003.parquet"
    url = f"{catalogue.PREFIX}{WIKI}@{hub_stand_in.COMMIT}/{path}"
    results = []
    threads = [threading.Thread(target=lambda: results.append(catalogue.open_file(url).read())) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert results == [server.repositories[WIKI][path]] * 4
