"""The three backends on shrunken copies of every family, from a hub cache, by alias; sequences short and long."""

from pathlib import Path

import pytest
import torch

from sae_italian.models import catalogue, load_model
from sae_italian.models.activations import (
    begun_at,
    entry_and_edit,
    logits_at,
    logits_with_replacement,
    read_activations,
    read_many,
    replaced,
)
from sae_italian.models.loading import TOLERANCE, largest_differences
from tests.models.hub import REVISION, SHRUNKEN


def lengths(config) -> tuple[int, int]:
    """A short sequence, and one longer than the window where there is one."""
    window = getattr(config, "sliding_window", None)
    return 33, (window + 80 if window else 400)


@pytest.mark.parametrize("repo_id", SHRUNKEN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backends_agree_at_every_layer_and_site(repo_id, cached_hub):
    name = catalogue()[repo_id].aliases[0].upper()
    hf = load_model(name)
    assert hf.loaded_from["name"] == repo_id and hf.loaded_from["revision"] == REVISION
    torch.manual_seed(1)
    long = lengths(hf.config)[1]
    others = {backend: load_model(name, backend) for backend in ("bridge", "hooked")}
    for length in lengths(hf.config):
        tokens = torch.randint(0, hf.config.vocab_size, (1, length))
        with torch.no_grad():
            assert hf(tokens).logits.std() > 0.3  # else agreement would mean nothing
        for backend, model in others.items():
            for what, difference in largest_differences(hf, model, tokens).items():
                assert difference < TOLERANCE, (backend, what, length, difference)
    assert long > (hf.config.sliding_window if getattr(hf.config, "sliding_window", None) else 0)


def test_the_window_matters_in_the_test_above(cached_hub):
    """Power: without its window the same model gives other logits past 2048 tokens."""
    hf = load_model("minerva-1b")
    tokens = torch.randint(0, 1000, (1, 2128))
    with torch.no_grad():
        with_window = hf(tokens).logits
        hf.config.sliding_window = None
        without = hf(tokens).logits
    assert (with_window - without)[:, :2000].abs().max() < 1e-4
    assert (with_window - without)[:, 2100:].abs().max() > 1e-2


def test_the_special_rows_and_lists_of_minerva_instruct_survive(cached_hub):
    config = load_model("minerva-7b-instruct").config
    assert config.vocab_size == 51264 and config.eos_token_id == [2, 51202]


@pytest.mark.parametrize("repo_id", ["sapienzanlp/Minerva-350M-base-v1.0", "mii-llm/zagreus-0.4B-ita"])
def test_normalised_mlp_input_is_the_same_everywhere(repo_id, cached_hub):
    """`ln2.hook_normalized`, which Llama Scope's transcoders read: before the gain, in all three backends."""
    from sae_italian.models.activations import read_activations

    tokens = torch.randint(0, 1000, (1, 50))
    hf, name = load_model(repo_id), "blocks.1.ln2.hook_normalized"
    expected = read_activations(hf, tokens, name)
    assert expected.pow(2).mean(-1).sqrt().sub(1).abs().max() < 1e-2
    assert (expected - read_activations(hf, tokens, "blocks.1.mlp.hook_in")).abs().max() > 0.1  # the gain
    for backend in ("bridge", "hooked"):
        _, cache = load_model(repo_id, backend).run_with_cache(tokens, names_filter=[name])
        assert (cache[name] - expected).abs().max() < TOLERANCE


FAMILIES = {
    "gemma2": {}, "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "llama": {}, "mistral": {"sliding_window": 16}, "qwen2": {}, "qwen3": {}, "phi3": {}, "olmo2": {}, "stablelm": {},
    "gpt2": {}, "gpt_neox": {},
}  # fmt: skip
IN_HOOKED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, mini, tmp_path_factory):
    """A random model's family, its folder, and the model as `hf` and as `bridge`."""
    from tests.models.hub import random_model, save_model

    family, folder = request.param, str(tmp_path_factory.mktemp("family"))
    config = {
        "model_type": family, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": len(mini.tokenizer), "pad_token_id": 0,
        "max_position_embeddings": 256, **FAMILIES[family],
    }  # fmt: skip
    if family.startswith("gpt"):
        del config["num_key_value_heads"]
    save_model(random_model(config), Path(folder))
    return family, folder, load_model(folder), load_model(folder, "bridge")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_family_reads_the_same(family):
    """Norms behind attention and MLP, norms of queries and keys, scaled embeddings, soft caps, mixed windows."""
    name, folder, hf, bridge = family
    tokens = torch.randint(3, 500, (1, 40))
    for other in [bridge, *([load_model(folder, "hooked")] if name in IN_HOOKED else [])]:
        for what, difference in largest_differences(hf, other, tokens).items():
            assert difference < TOLERANCE, (type(other), what, difference)
    wanted = torch.rand(tokens.shape) < 0.2
    with torch.no_grad():  # the soft cap of Gemma 2 comes after the head
        assert torch.allclose(logits_at(hf, tokens, wanted), hf(tokens).logits[wanted], atol=1e-5)


WRITTEN = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out",
           "blocks.0.mlp.hook_in", "blocks.1.hook_resid_post")  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_family_is_replaced_and_patched_the_same(family):
    """Ours from the block on and with hf's own modules, TransformerLens' over the whole bridge: the same logits to rounding.

    Replaced is the whole activation, by noise; patched are the last five positions, by those of another text.
    """
    _, _, hf, bridge = family
    base, target = torch.randint(3, 500, (2, 1, 40), generator=torch.Generator().manual_seed(0))
    noise = torch.randn((1, 40, 64), generator=torch.Generator().manual_seed(1))
    late, last = (torch.arange(40) >= 35)[:, None], torch.arange(40)[None] == 39

    def noised(x, hook=None):
        return 0.3 * x + noise

    with torch.no_grad():
        clean = hf(base).logits
        for name in WRITTEN:
            other, (entry, edit) = read_activations(hf, target, name), entry_and_edit(hf, name)

            def patched(x, hook=None, other=other):
                return torch.where(late, other, x)

            with begun_at(hf, entry, read_activations(hf, base, entry)), replaced(hf, edit, patched):
                from_the_block = logits_at(hf, base, last)
            over_the_bridge = bridge.run_with_hooks(base, fwd_hooks=[(name, patched)])[:, -1]
            ours = logits_with_replacement(hf, base, name, noised)
            theirs = bridge.run_with_hooks(base, fwd_hooks=[(name, noised)])
            patches = (from_the_block, over_the_bridge, clean[:, -1])
            for what, (one, two, before) in {"replaced": (ours, theirs, clean), "patched": patches}.items():
                assert (one - two).abs().max() < 5e-6 * one.abs().max(), (name, what)
                moved = (one - before).abs().max() / before.abs().max()
                assert moved > 0.02, (name, what)  # else it would mean nothing


def test_a_difference_is_seen_where_it_is():
    """Power of the tests above: the last layer's MLP a thousandth larger shows behind it, and not before it."""
    other = load_model("sae-italian-mini", "bridge")
    tokens = torch.randint(3, 500, (1, 40))
    changed = load_model("sae-italian-mini")
    with torch.no_grad():
        changed.get_submodule("model.layers.3.mlp.down_proj").weight.mul_(1.001)
    found = largest_differences(changed, other, tokens)
    seen = {what.split()[0] for what, difference in found.items() if difference > TOLERANCE}
    assert seen == {"logits", "R", "M"}, found


def test_one_wrong_logit_of_the_vocabulary_is_seen_in_its_spread(mini):
    class Off:
        def run_with_cache(self, tokens, names_filter):
            logits = mini(tokens).logits
            logits[0, 5, 7] += 1e-3 * logits[0, 5].std()
            return logits, read_many(mini, tokens, names_filter)

    found = largest_differences(mini, Off(), torch.randint(3, 500, (1, 40)))
    assert found.pop("logits (over their spread)") == pytest.approx(1e-3, rel=0.01)
    assert max(found.values()) == 0


@pytest.mark.slow
def test_minerva_350m_whole(tmp_path, monkeypatch):
    """Random weights in the real geometry, 351.57 M parameters, shorter and longer than the window of 2048."""
    from tests.models.conftest import use_cache
    from tests.models.hub import put_in_cache, random_model, save_model

    config = {
        "model_type": "mistral", "hidden_size": 1152, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "intermediate_size": 4032, "vocab_size": 32768, "sliding_window": 2048,
        "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    repo_id = "sapienzanlp/Minerva-350M-base-v1.0"
    put_in_cache(tmp_path, repo_id, save_model(random_model(config | {"initializer_range": 0.02}), tmp_path / "saved"))
    use_cache(monkeypatch, tmp_path)
    hf = load_model("minerva-350m")
    assert sum(parameter.numel() for parameter in hf.parameters()) == 351_573_120
    assert not hf.loaded_from["differences"]
    for backend in ("bridge", "hooked"):
        other = load_model("minerva-350m", backend)
        for length in (64, 2200):
            tokens = torch.randint(0, 32768, (1, length))
            for what, difference in largest_differences(hf, other, tokens).items():
                assert difference < TOLERANCE, (backend, what, length, difference)
        del other


@pytest.mark.slow
def test_memory_of_hf_and_bridge_is_that_of_the_weights(tmp_path):
    """Peak resident memory while loading 1.3 GiB of weights, over what importing the libraries takes."""
    import subprocess
    import sys

    from tests.models.hub import random_model, save_model

    config = {
        "model_type": "mistral", "hidden_size": 1152, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "intermediate_size": 4032, "vocab_size": 32768, "sliding_window": 2048,
        "max_position_embeddings": 16384, "tie_word_embeddings": False,
    }  # fmt: skip
    save_model(random_model(config), tmp_path / "m")
    code = """import re, sys, sae_italian.models.loud, transformers
from sae_italian.models import load_model
load_model('mini', sys.argv[2])
rss = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024
before = rss(); model = load_model(sys.argv[1], sys.argv[2]); model(transformers.AutoTokenizer.from_pretrained(
    sys.argv[1])('ciao', return_tensors='pt').input_ids)  # weights are mapped, and resident once used
print((rss() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))"""
    for backend in ("hf", "bridge"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "m"), backend], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert 0.5 < float(done.stdout.splitlines()[-1]) < 1.15, backend
