import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig, GemmaTokenizer

from sae_italian.base.errors import UsageError
from sae_italian.models import catalogue, load_model, resolve
from sae_italian.models.activations import logits_with_replacement, read_activations
from sae_italian.models.loading import compare_backends, load_model_config, load_tokenizer


@pytest.fixture(scope="module")
def backends():
    return {backend: load_model("sae-italian-mini", backend) for backend in ("hf", "bridge", "hooked")}


@pytest.mark.parametrize("n_tokens", [20, 200])  # shorter and longer than the sliding window of 64
def test_the_three_backends_give_the_same_logits(backends, n_tokens):
    torch.manual_seed(0)
    tokens = torch.randint(3, backends["hf"].config.vocab_size, (2, n_tokens))
    with torch.no_grad():
        expected = backends["hf"](tokens).logits
        assert expected.std() > 0.5
        for name in ("bridge", "hooked"):
            assert (backends[name](tokens) - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_in"])
@pytest.mark.parametrize("layer", [0, 3])
def test_activations_agree_with_hooked_transformer(backends, site, layer):
    tokens = torch.randint(3, 500, (2, 40))
    name = f"blocks.{layer}.{site}"
    expected = backends["hooked"].run_with_cache(tokens, names_filter=[name])[1][name]
    assert (read_activations(backends["hf"], tokens, name) - expected).abs().max() < 1e-4


def test_replacing_by_itself_changes_nothing_and_by_zero_everything(mini):
    tokens = torch.randint(3, 500, (1, 30))
    with torch.no_grad():
        clean = mini(tokens).logits
    same = logits_with_replacement(mini, tokens, "blocks.1.hook_resid_post", lambda x: x)
    zero = logits_with_replacement(mini, tokens, "blocks.1.hook_resid_post", torch.zeros_like)
    assert torch.equal(same, clean)
    assert (zero - clean).abs().max() > 0.1
    assert torch.equal(mini(tokens).logits, clean)  # hooks are gone afterwards


def test_tokenizer_adds_one_bos_and_round_trips_italian(mini):
    text = "Perché l'università è così? Un'altra «città», già 12 più: è né sarà. 🙂"
    ids = mini.tokenizer(text).input_ids
    assert ids.count(mini.tokenizer.bos_token_id) == 1 and ids[0] == mini.tokenizer.bos_token_id
    assert mini.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tokenizer_holds_its_vocabulary_once_and_is_saved_whole(tmp_path):
    """transformers keeps the vocabulary and the merges that it was made of beside it: 0.14 GB of 262,144 entries."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"ciao", "ci", "ao", "ciao", "▁ciao"]
    merges = [("c", "i"), ("a", "o"), ("ci", "ao"), ("▁", "ciao")]
    theirs = GemmaTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=merges)
    theirs.save_pretrained(tmp_path)
    Gemma3TextConfig(vocab_size=len(letters)).save_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path))
    assert not {"_vocab", "_merges"} & vars(ours).keys()
    ours.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for tokenizer in (ours, again):
        assert tokenizer.get_vocab() == theirs.get_vocab()
        assert tokenizer("ciao ciao").input_ids == theirs("ciao ciao").input_ids


def test_no_backend_reads_the_tokenizer_twice(monkeypatch):
    read, real = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *args, **more: read.append(args) or real(*args, **more)
    )
    for backend in ("hf", "bridge", "hooked"):
        read.clear()
        load_model("sae-italian-mini", backend)
        assert len(read) == 1, backend


def test_mini_is_minerva_in_small_and_small_enough(mini):
    from pathlib import Path

    folder = Path(catalogue()["sae-italian-mini"].official)
    config = mini.config
    assert config.model_type == "mistral" and not config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads and config.sliding_window
    assert 1e6 <= sum(p.numel() for p in mini.parameters()) <= 4e6
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 * 2**20
    assert "torch.float16" in str(load_model("mini", dtype="float16").dtype)


@pytest.mark.parametrize("can", [True, False])
def test_a_processor_without_bfloat16_is_told_of(can, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: can)
    load_model("mini", dtype="bfloat16")
    assert ("No bfloat16" in capsys.readouterr().err) is not can


def test_without_fetching_only_weights_that_are_here_are_loaded(empty_hub):
    assert load_model("mini", fetch=False).config.model_type == "mistral"
    with pytest.raises(UsageError, match="not on this machine"):
        load_model("sapienzanlp/Minerva-350M-base-v1.0", fetch=False)


@pytest.mark.parametrize("folder", ["roberto", "llama-prove", "gemma", "alberto/t5"])
def test_a_local_folder_loads_whatever_its_path_is_called(tmp_path, folder):
    path = tmp_path / folder / "model"
    shutil.copytree(catalogue()["sae-italian-mini"].official, path)
    assert compare_backends(str(path), "La casa è bella.")["ok"]


def test_names_resolve_in_any_case_and_save_the_official_id():
    assert resolve("MINERVA-1B").saved_name == resolve("minerva-1b").saved_name == "sapienzanlp/Minerva-1B-base-v1.0"
    assert resolve("mini").saved_name == "sae-italian-mini"
    assert resolve("someone/something").load_from == "someone/something"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minreva-1b", "Did you mean 'minerva-1b'"),
        ("./nowhere", "neither a known name"),
        ("minerva-1b", "hf download"),  # offline, nothing cached
    ],
)
def test_a_model_that_is_not_there_says_what_to_do(name, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=message) as error:
        load_model(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UsageError, match="config.json"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_a_control_token_typed_in_a_document_is_characters_in_every_backend(backends, backend):
    """One BOS, that of the model's own rule, and the typed `<s>` and `</s>` spelled out: the tokens of `hf`."""
    model, plain = backends[backend], backends["hf"].tokenizer
    text = "Il <s>barrato</s> resta testo."
    tokens = model.to_tokens(text)
    assert tokens.tolist() == [plain(text).input_ids] == [model.tokenizer(text).input_ids]
    special = [plain.bos_token_id, plain.eos_token_id]
    assert sum(int(token) in special for token in tokens[0]) == 1 and tokens[0, 0] == plain.bos_token_id
    assert model.to_tokens(text, prepend_bos=False).tolist() == [plain(text, add_special_tokens=False).input_ids]
    assert model.to_string(tokens[0, 1:]) == text and len(model.to_str_tokens(text)) == tokens.shape[1]
    many = model.to_tokens([text, "Ciao."], padding_side="left")
    assert many.shape == (2, tokens.shape[1]) and many[1, -3:].tolist() == plain("Ciao.").input_ids[-3:]
    assert (model(text) - model(tokens)).abs().max() < 1e-6
    assert model.to_tokens("a " * 9000).shape[1] == model.cfg.n_ctx


def test_unknown_backend():
    with pytest.raises(UsageError, match="hooked"):
        load_model("mini", "hoked")  # pyright: ignore


def test_the_hub_is_asked_once_for_a_config(cached_hub, monkeypatch):
    """A suite of 256 SAEs asks for it more than 256 times, and the hub refuses who asks too often."""
    asked, ask = [], AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: asked.append(a) or ask(*a, **k))
    widths = {load_model_config(name).hidden_size for name in ("minerva-350m", "sapienzanlp/Minerva-350M-base-v1.0")}
    assert widths == {288} and len(asked) == 1
    load_model_config("minerva-1b")
    assert len(asked) == 2
