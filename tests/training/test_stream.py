import copy
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from sae_italian.base.errors import UsageError
from sae_italian.corpora import CorpusStream, Reader, iter_documents, pack
from sae_italian.models.activations import read_activations
from sae_italian.training import ActivationStream
from sae_italian.training.text import documents_of


def stream(mini, corpus, **changes):
    settings = {"context_size": 32, "batch_size": 64, "forward_windows": 4, "buffer_tokens": 512, "seed": 3} | changes
    return ActivationStream(mini, lambda: CorpusStream(corpus), "blocks.1.hook_resid_post", **settings)


def test_batches_are_the_models_activations_each_once(mini, jsonl):
    """Over a whole buffer's worth, the rows served are rows the model gave, and none comes twice."""
    source = stream(mini, jsonl)
    served = torch.cat([next(source) for _ in range(16)])
    blocks = pack(iter_documents(jsonl), mini.tokenizer, 32, windows_per_block=4)
    known = []
    for _ in range(20):
        block = next(blocks)
        acts = read_activations(mini, torch.from_numpy(block.tokens), "blocks.1.hook_resid_post")
        known.append(acts[torch.from_numpy(block.tokens) != mini.tokenizer.bos_token_id])
    known = torch.cat(known)
    from collections import Counter

    given, got = (Counter(tuple(row[:6].tolist()) for row in rows) for rows in (known, served))
    assert all(got[row] <= given[row] for row in got)  # equal windows give equal rows, so rows are counted
    first = [tuple(row[:6].tolist()) for row in known[:200]]
    assert [tuple(row[:6].tolist()) for row in served[:200]] != first


def test_training_reads_the_training_documents_alone(jsonl):
    read = [document.text for document in documents_of(str(jsonl))()]  # pyright: ignore[reportCallIssue]
    assert read == [document.text for document in iter_documents(jsonl, "train")] and 350 < len(read) < 400


def test_the_same_seed_serves_the_same_and_another_does_not(mini, jsonl):
    one, same, other = (stream(mini, jsonl, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(next(one), next(same))
    assert not torch.equal(next(one), next(other))


def test_a_saved_stream_continues_with_the_very_same_batches(mini, jsonl, tmp_path):
    first = stream(mini, jsonl)
    for _ in range(13):
        next(first)
    first.save(tmp_path)
    expected = [next(first) for _ in range(30)]
    second = stream(mini, jsonl)
    second.load(tmp_path)
    for batch in expected:
        assert torch.equal(next(second), batch)


def test_a_corpus_is_read_again_when_it_ends_unless_told_otherwise(mini, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"La casa numero {i} è bella e grande." for i in range(60)))
    again = stream(mini, tmp_path / "a.txt")
    for _ in range(40):
        next(again)
    once = stream(mini, tmp_path / "a.txt", repeat=False)
    assert len(stream(mini, tmp_path / "a.txt", repeat=False, buffer_tokens=1024).sample(once.hook_names[0])) == 689
    served = []
    with pytest.raises(UsageError, match="the corpus ended after 689 tokens"):
        for _ in range(40):
            served.append(len(next(once)))
    torch.manual_seed(5)  # the last slots too are drawn by the stream's own seed
    twins = [stream(mini, tmp_path / "a.txt", repeat=False) for _ in range(2)]
    assert all(torch.equal(*map(next, twins)) for _ in range(10))
    blocks = pack(iter_documents(tmp_path / "a.txt"), mini.tokenizer, 32)
    assert sum(served) == sum(int((block.tokens != mini.tokenizer.bos_token_id).sum()) for block in blocks) == 689
    assert set(served[:-1]) == {64}


def test_a_stream_saved_at_the_end_of_its_corpus_goes_on_when_asked_to_repeat(mini, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"La casa numero {i} è bella e grande." for i in range(60)))
    once = stream(mini, tmp_path / "a.txt", repeat=False)
    for _ in range(9):
        next(once)
    assert once.ended and (once.order.diff() < 0).any()  # what is left comes in an order drawn anew
    once.save(tmp_path)
    expected = [next(once) for _ in range(2)]
    goes_on, ends = (stream(mini, tmp_path / "a.txt", repeat=repeat) for repeat in (True, False))
    goes_on.load(tmp_path)
    ends.load(tmp_path)
    assert all(torch.equal(next(ends), batch) for batch in expected)
    with pytest.raises(UsageError, match="ended after 689"):
        next(ends)
    ends.load(tmp_path)
    ends.processes = SimpleNamespace(world=65)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UsageError, match="ended after 689"):
        next(ends)  # 64 rows, of which one would get none
    assert all(len(next(goes_on)) == 64 for batch in range(20))


def test_a_corpus_shorter_than_one_window(mini, tmp_path):
    (tmp_path / "a.txt").write_text("ciao")
    with pytest.raises(UsageError, match="too short"):
        next(stream(mini, tmp_path / "a.txt"))


HOOKS = ["blocks.0.hook_resid_post", "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"]


def several(mini, corpus, **changes):
    settings = {"context_size": 32, "batch_size": 64, "forward_windows": 4, "buffer_tokens": 512, "seed": 3} | changes
    return ActivationStream(mini, lambda: CorpusStream(corpus), HOOKS, **settings)


def test_several_hooks_give_the_same_tokens_as_one_by_one(mini, jsonl):
    together, alone = several(mini, jsonl), [several_at(mini, jsonl, name) for name in HOOKS]
    for _ in range(12):
        batch = next(together)
        assert list(batch) == HOOKS
        for name, one in zip(HOOKS, alone, strict=True):
            assert torch.equal(batch[name], next(one))


def several_at(mini, corpus, name):
    return ActivationStream(
        mini, lambda: CorpusStream(corpus), name, context_size=32, batch_size=64, forward_windows=4,
        buffer_tokens=512, seed=3,
    )  # fmt: skip


def test_one_forward_pass_serves_all_hooks_and_stops_after_the_last(mini, jsonl):
    calls = {"embed": 0, "mlp": 0, "last": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    modules = {"embed": mini.model.embed_tokens, "mlp": mini.model.layers[2].mlp, "last": mini.model.layers[3]}
    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    source = several(mini, jsonl)
    for _ in range(12):
        next(source)
    for handle in handles:
        handle.remove()
    assert calls == {"embed": source.windows.n_blocks, "mlp": source.windows.n_blocks, "last": 0}


def test_the_buffer_is_of_the_size_asked_for_and_allocated_once(mini, jsonl):
    source = stream(mini, jsonl, buffer_tokens=500, batch_size=300)
    before = source.buffer.data_ptr()
    for _ in range(10):
        assert next(source).shape == (300, mini.config.hidden_size)
    assert source.buffer.data_ptr() == before and source.buffer.shape == (1, 500, mini.config.hidden_size)
    halves = stream(mini, jsonl)
    assert len(next(halves)) == 64 and len(halves.order) == 512 // 2 - 64  # to be served before the next permutation
    with pytest.raises(UsageError, match="buffer_tokens is 100, less than one batch of 300"):
        stream(mini, jsonl, buffer_tokens=100, batch_size=300)


def known_rows(mini, corpus, keep, n_blocks=40):
    rows = set()
    for block in islice(pack(iter_documents(corpus), mini.tokenizer, 32, windows_per_block=4), n_blocks):
        acts = read_activations(mini, torch.from_numpy(block.tokens), "blocks.1.hook_resid_post")
        rows |= {tuple(row[:6].tolist()) for row in acts[torch.from_numpy(keep(block.tokens))]}
    return rows


@pytest.mark.parametrize(
    ("changes", "keep"),
    [
        ({"seqpos_slice": (8, 20, 3)}, lambda tokens: at(tokens, slice(8, 20, 3)) & (tokens != 1)),
        ({"exclude_special_tokens": False}, lambda tokens: tokens >= 0),
        ({"exclude_special_tokens": [1, 50]}, lambda tokens: (tokens != 1) & (tokens != 50)),
    ],
)
def test_positions_and_tokens_are_left_out_as_asked(mini, jsonl, changes, keep):
    assert mini.tokenizer.bos_token_id == 1
    source = stream(mini, jsonl, **changes)
    served = {tuple(row[:6].tolist()) for _ in range(4) for row in next(source)}
    assert served <= known_rows(mini, jsonl, keep)
    (bos,) = known_rows(mini, jsonl, lambda tokens: at(tokens, 0), n_blocks=1)
    assert (bos in served) == (changes == {"exclude_special_tokens": False})


def at(tokens, positions):
    mask = tokens < 0
    mask[:, positions] = True
    return mask


def test_a_slice_that_keeps_nothing_is_refused(mini, jsonl):
    with pytest.raises(UsageError, match="keeps no position of a window of 32 tokens"):
        stream(mini, jsonl, seqpos_slice=(40, 50))
    with pytest.raises(UsageError, match=r"it must be \[stop\] or \[start, stop, step\]"):
        stream(mini, jsonl, seqpos_slice=("a", 50))


def test_bfloat16_stays_bfloat16(jsonl):
    from sae_italian.models import load_model

    source = stream(load_model("sae-italian-mini", dtype="bfloat16"), jsonl)
    assert next(source).dtype == torch.bfloat16
    assert source.buffer.dtype == torch.bfloat16


class OnDemand:
    """Does what it is given when the result is asked for: nothing is read ahead."""

    def submit(self, function, *given):
        return SimpleNamespace(result=lambda: function(*given))


class Remembers(CorpusStream):
    """A corpus that keeps the ids of the documents that were read of it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def __next__(self):
        document = super().__next__()
        self.read.append(document.doc_id)
        return document


def test_reading_ahead_changes_nothing_and_a_corpus_is_resumed_at_its_place(mini, jsonl, tmp_path):
    opened = []

    def documents():
        opened.append(Remembers(jsonl, Reader(split="train")))
        return opened[-1]

    def source():
        settings = {"context_size": 32, "batch_size": 64, "forward_windows": 4, "buffer_tokens": 512}
        return ActivationStream(mini, documents, HOOKS[0], **settings)

    first, plain = source(), source()
    plain.windows.pool = OnDemand()  # pyright: ignore[reportAttributeAccessIssue]
    for _ in range(90):
        assert torch.equal(next(first), next(plain))
    first.save(tmp_path)
    expected = [next(first) for _ in range(60)]
    again = source()
    again.load(tmp_path)
    for batch in expected:
        assert torch.equal(next(again), batch)
    assert opened[-1].read[0] not in opened[0].read[:64], "not from the first document again"


def test_activations_that_are_not_finite_are_named(mini, jsonl):
    broken = copy.deepcopy(mini)
    broken.tokenizer = mini.tokenizer
    tokens = next(pack(iter_documents(jsonl), mini.tokenizer, 32, windows_per_block=32)).tokens
    later = next(token for token in tokens[4:].flatten() if token not in tokens[:4])  # than the first block
    with torch.no_grad():
        broken.model.embed_tokens.weight[later] = float("nan")
    window = int((tokens == later).any(axis=1).nonzero()[0][0])
    with pytest.raises(UsageError, match=f"'blocks.1.hook_resid_post' are not finite: window {window} .*float32"):
        next(stream(broken, jsonl))


def test_saelens_own_trainer_takes_the_stream(mini, jsonl, small_spec):
    from sae_lens import SAETrainer, TrainingSAE

    config = small_spec.model_copy(update={"training_tokens": 2048}).to_saelens()
    sae = TrainingSAE.from_dict(config.get_training_sae_cfg_dict())
    trainer = SAETrainer(config.to_sae_trainer_config(), sae, stream(mini, jsonl, batch_size=512))
    trainer.fit()
    assert trainer.n_training_samples == 2048
