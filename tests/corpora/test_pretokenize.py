"""Pretokenised folders: SAELens reads and trains from them, our stream maps them, and nothing is lost on the way."""

import errno
import json

import datasets
import numpy as np
import pytest
import torch

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import locked
from sae_italian.corpora import CorpusStream, TextDocument, iter_documents, pack, pretokenize
from sae_italian.corpora.packing import NO_DOCUMENT, Packer, layout_of, tokenised
from sae_italian.corpora.pretokenize import PretokenizedCorpus
from sae_italian.corpora.stream import Reader
from tests.corpora.test_packing import HARD, TOKENIZERS

TOKENIZER = TOKENIZERS["metaspace"]
make = pretokenize.pretokenize


@pytest.fixture
def corpus(tmp_path):
    """600 documents, some many windows long, with everything that makes Italian text hard to rebuild."""
    rows = [{"text": f"{i}. {HARD[i % len(HARD)]} " + HARD[0] * (i % 7)} for i in range(600)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def all_files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in (".arrow", ".npy", ".parquet")}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_is_rebuilt_from_offsets_and_tokens_are_those_of_pack(corpus, tmp_path, kind):
    tokenizer = TOKENIZERS[kind]
    folder = make(corpus, tokenizer, tmp_path / "out", context_size=16, windows_per_shard=200, reader=Reader())
    made = PretokenizedCorpus(folder)
    packed = np.concatenate([b.tokens for b in pack(iter_documents(corpus), tokenizer, 16)])
    assert len(list(folder.glob("data-*"))) > 3 and np.array_equal(made.windows(0, len(made)), packed)
    covered: dict[int, list[tuple[int, int]]] = {}
    spans = np.concatenate([np.load(file) for file in sorted(folder.glob("spans-*.npy"))], axis=1)
    assert spans.shape == (3, *packed.shape)
    for d, a, b in spans.reshape(3, -1).T.tolist():
        if d != NO_DOCUMENT:
            covered.setdefault(d, []).append((a, b))
    texts, kept = ([document.text for document in iter_documents(source)] for source in (corpus, folder))
    for index in sorted(covered)[:-1]:
        text, rebuilt, position = kept[index], "", 0
        for a, b in sorted(covered[index]):
            rebuilt += text[max(a, position) : b] if b > position else ""
            position = max(position, b)
        assert rebuilt == text == texts[index]


def test_the_folder_is_a_saved_dataset_with_saelens_metadata(corpus, tmp_path):
    folder = make(corpus, TOKENIZER, tmp_path / "out", context_size=32)
    table = datasets.load_from_disk(folder)
    assert table.column_names == ["input_ids"] and {len(row) for row in table["input_ids"]} == {32}
    metadata = json.loads((folder / "sae_lens.json").read_text())
    assert metadata["context_size"] == 32 and metadata["sequence_separator_token"] == "bos"
    from sae_lens.pretokenize_runner import PretokenizedDatasetMetadata

    assert set(metadata) == set(PretokenizedDatasetMetadata.__annotations__)
    counts = PretokenizedCorpus(folder).counts
    assert counts.dropped["other_split"] + counts.kept == counts.read == 600
    assert not {d.text for d in iter_documents(folder)} & {d.text for d in iter_documents(corpus, "heldout")}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("separator", ["bos", "eos", 5, None])
def test_packing_is_saelens_packing(bos, separator):
    from sae_lens.tokenization_and_batching import concat_and_batch_sequences

    layout = layout_of(TOKENIZER, prepend_bos=bos, separator=separator)
    documents = [TextDocument(HARD[i % len(HARD)] * (1 + i % 3), str(i), "t") for i in range(300)]
    ids = (torch.tensor(TOKENIZER(d.text, add_special_tokens=False).input_ids) for d in documents)
    expected = list(concat_and_batch_sequences(ids, 13, layout.bos, None, layout.separator))
    packer = Packer(13, layout)
    for batch in tokenised(documents, TOKENIZER, 7):
        packer.add(*batch)
    found = packer.take(packer.n_windows).tokens
    assert np.array_equal(found, torch.stack(expected).numpy())


def test_a_full_disk_keeps_finished_shards_and_resumes_to_the_same_files(corpus, tmp_path, monkeypatch):
    settings = {"context_size": 16, "windows_per_shard": 150}
    whole = make(corpus, TOKENIZER, tmp_path / "whole", **settings)
    save, calls = np.save, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(pretokenize.np, "save", full)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"is full .*2 finished shards are kept.*--resume"):
        make(corpus, TOKENIZER, out, **settings)
    assert [f.name for f in out.iterdir() if f.name.endswith(".tmp")] == []
    with pytest.raises(DataError, match="not finished"):
        PretokenizedCorpus(out)
    with pytest.raises(UsageError, match="--resume to finish"):
        make(corpus, TOKENIZER, out, **settings)
    make(corpus, TOKENIZER, out, **settings, resume=True)
    assert all_files(out) == all_files(whole)


def test_two_writers_of_one_folder_are_refused_by_name(corpus, tmp_path):
    out = tmp_path / "out"
    with locked(out), pytest.raises(UsageError, match=f"{out} is being written by another process"):
        make(corpus, TOKENIZER, out, context_size=16, n_tokens=1000)
    assert not out.exists()
    made = PretokenizedCorpus(make(corpus, TOKENIZER, out, context_size=16, n_tokens=1000))
    with locked(out), pytest.raises(UsageError, match="is being written by another process"):
        make(corpus, TOKENIZER, out, context_size=16, n_tokens=1000, overwrite=True)
    assert len(made) == 63 and (out / "data-00000.arrow").is_file()


def test_another_run_in_the_folder_and_bad_settings_are_refused(corpus, tmp_path):
    out = make(corpus, TOKENIZER, tmp_path / "out", context_size=16, n_tokens=1000)
    assert len(PretokenizedCorpus(out)) == 63
    with pytest.raises(UsageError, match="context_size was 16, is now 32"):
        make(corpus, TOKENIZER, out, context_size=32, n_tokens=1000, resume=True)
    with pytest.raises(UsageError, match="separator 'eoss' is unknown. Did you mean 'eos'"):
        make(corpus, TOKENIZER, tmp_path / "b", context_size=16, separator="eoss")
    with pytest.raises(UsageError, match="no sep token"):
        make(corpus, TOKENIZER, tmp_path / "b", context_size=16, separator="sep")
    for beyond in (len(TOKENIZER), 2**40, -1):  # it was written into the windows, or was no 32 bits
        with pytest.raises(
            UsageError, match=f"separator {beyond} is unknown. Valid: .*an id of 0 to {len(TOKENIZER) - 1}"
        ):
            make(corpus, TOKENIZER, tmp_path / "b", context_size=16, separator=beyond)
    with pytest.raises(UsageError, match="does not fill one window"):
        make(corpus, TOKENIZER, tmp_path / "c", context_size=1_000_000)
    make(corpus, TOKENIZER, tmp_path / "c", context_size=16)  # as was advised, into the same folder
    with pytest.raises(UsageError, match="no end"):
        make("micro-italiano", TOKENIZER, tmp_path / "d", context_size=16)
    (out / "data-00000.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read|holds 0 windows"):
        PretokenizedCorpus(out)


def test_the_folders_of_saelens_are_read_too(mini, jsonl, tmp_path):
    from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig

    name = mini.tokenizer.name_or_path
    settings = {"tokenizer_name": name, "dataset_path": "json", "data_files": {"train": str(jsonl)}, "context_size": 32}
    config = PretokenizeRunnerConfig(**settings, num_proc=1, shuffle=False, save_path=str(tmp_path / "theirs"))
    PretokenizeRunner(config).run()
    theirs = PretokenizedCorpus(tmp_path / "theirs")
    assert theirs.context_size == 32 and theirs.split == "train" and theirs.is_made_for(mini.tokenizer)
    assert not theirs.is_made_for(TOKENIZER)
    table = datasets.load_from_disk(tmp_path / "theirs")
    assert np.array_equal(theirs.windows(3, 9), np.array(table["input_ids"][3:9]))
    assert sum(len(block) for block in theirs.blocks(7)) == len(theirs) == len(table)


@pytest.fixture(scope="module")
def pretokenized(mini, jsonl, tmp_path_factory):
    return make(jsonl, mini.tokenizer, tmp_path_factory.mktemp("pretokenized") / "out", context_size=32)


def test_our_stream_maps_it_and_resumes_in_it(mini, jsonl, pretokenized, tmp_path):
    from sae_italian.training import ActivationStream

    def opened(documents, **changes):
        settings = {"context_size": 32, "batch_size": 64, "forward_windows": 4, "buffer_tokens": 512, "seed": 3}
        return ActivationStream(mini, documents, "blocks.1.hook_resid_post", **(settings | changes))

    mapped, read = opened(PretokenizedCorpus(pretokenized)), opened(lambda: CorpusStream(jsonl, Reader(split="train")))
    for _ in range(20):
        assert torch.equal(next(mapped), next(read))
    mapped.save(tmp_path)
    expected = [next(mapped) for _ in range(200)]  # past the end of the corpus: from its beginning again
    again = opened(PretokenizedCorpus(pretokenized))
    again.load(tmp_path)
    assert all(torch.equal(next(again), batch) for batch in expected)
    with pytest.raises(UsageError, match="windows of 32 tokens, context_size is 16"):
        opened(PretokenizedCorpus(pretokenized), context_size=16)


def test_our_training_takes_the_folder_as_a_corpus(small_spec, pretokenized, tmp_path):
    from sae_italian.training import train

    spec = small_spec.model_copy(update={"corpus": str(pretokenized), "context_size": 32, "training_tokens": 2048})
    assert (train(spec, tmp_path / "sae") / "sae_weights.safetensors").is_file()


def test_other_tokenizers_and_splits_are_refused(mini, jsonl, corpus, tmp_path):
    from sae_italian.training.text import check_pretokenized

    other = PretokenizedCorpus(make(corpus, TOKENIZER, tmp_path / "other", context_size=32))
    with pytest.raises(UsageError, match="another tokenizer"):
        check_pretokenized(other, mini.tokenizer, 32)
    all_of_it = make(jsonl, mini.tokenizer, tmp_path / "all", context_size=32, reader=Reader(split="all"))
    with pytest.raises(UsageError, match="training needs 'train'"):
        check_pretokenized(PretokenizedCorpus(all_of_it), mini.tokenizer, 32)


def test_stock_saelens_trains_from_it(small_spec, pretokenized, jsonl, tmp_path):
    """The stock runner, on the folder and on `load_corpus`, as `override_dataset`."""
    from sae_lens import LanguageModelSAETrainingRunner
    from sae_lens.load_model import HookedProxyLM

    from sae_italian import load_corpus, load_model

    config = small_spec.model_copy(update={"context_size": 32, "training_tokens": 2048}).to_saelens()
    config.hook_name, config.logger.log_to_wandb, config.n_eval_batches = "model.layers.2", False, 1
    config.save_final_checkpoint, config.output_path = False, str(tmp_path / "sae")
    config.sae.normalize_activations = "none"  # its estimate of the norm reads a thousand batches
    hf = load_model("sae-italian-mini")
    model = HookedProxyLM(hf, hf.tokenizer, ["model.layers.2"])
    for dataset in (datasets.load_from_disk(pretokenized), load_corpus(jsonl)):
        runner = LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_model=model)
        assert runner.activations_store.is_dataset_tokenized == ("input_ids" in dataset.column_names)
        assert runner.run().cfg.d_sae == 256
