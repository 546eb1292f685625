import pytest
import torch

from sae_italian.corpora import iter_documents
from sae_italian.errors import UsageError
from sae_italian.models.activations import read_activations
from sae_italian.training import ActivationStream


def stream(mini, corpus, **changes):
    settings = {"context_size": 32, "batch_size": 64, "forward_windows": 4, "buffer_tokens": 512, "seed": 3} | changes
    return ActivationStream(mini, lambda: iter_documents(corpus), "blocks.1.hook_resid_post", **settings)


def test_batches_are_the_models_activations_each_once(mini, jsonl):
    """Over a whole buffer's worth, the rows served are rows the model gave, and none comes twice."""
    from sae_italian.corpora import pack

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
    with pytest.raises(UsageError, match="ended after 689 tokens"):
        for _ in range(40):
            next(once)


def test_a_corpus_shorter_than_one_window(mini, tmp_path):
    (tmp_path / "a.txt").write_text("ciao")
    with pytest.raises(UsageError, match="too short"):
        next(stream(mini, tmp_path / "a.txt"))
