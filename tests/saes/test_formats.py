"""Other programs' files: read with their own maths, or named for what they are with what to do; damaged ones in one line."""

import copy
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_italian.base.errors import DataError, UsageError
from sae_italian.saes import check_fits, load_sae
from sae_italian.training.loop import Loop
from tests import fresh
from tests.saes.formats import (
    dictionary_forward,
    dictionary_weights,
    llama_scope_weights,
    sparsify_forward,
    sparsify_weights,
    write_dictionary,
    write_llama_scope,
    write_sparsify,
)
from tests.saes.test_releases import assert_is


def sharded(file) -> None:
    """Cut a safetensors file into one shard a tensor, with the index that transformers writes."""
    tensors, index = load_file(file), {}
    for i, (name, tensor) in enumerate(tensors.items()):
        index[name] = f"{file.stem}-{i + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, file.with_name(index[name]))
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": index}))
    file.unlink()


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"]
)
def test_dictionary_learning(tmp_path, kind):
    weights, x = dictionary_weights(kind, 16, 64), 2 * torch.randn(40, 16)
    sae = load_sae(write_dictionary(tmp_path / "trainer_0", kind, weights, 5))
    z, y = dictionary_forward(kind, weights, 5, x)
    assert 0 < (z != 0).sum(-1).float().mean() < 64
    assert_is(sae, z, y, x)
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.3.hook_resid_post" and metadata.context_size == 1024
    assert metadata.model_name == "pythia-160m-deduped"


@pytest.mark.parametrize(
    ("submodule", "io", "hook_name"),
    [
        ("resid_post_layer_3", "out", "blocks.3.hook_resid_post"),
        ("resid_out_layer3", "out", "blocks.3.hook_resid_post"),
        ("mlp_out_layer3", "out", "blocks.3.hook_mlp_out"),
        ("mlp_layer_3", "out", "blocks.3.hook_mlp_out"),
        ("attn_out_layer3", "out", "blocks.3.hook_attn_out"),
        ("gpt_neox.layers.3.mlp", "out", "blocks.3.hook_mlp_out"),
        ("model.layers.3", "in", None),
        ("blocks.3.hook_attn_out", "in", "blocks.3.hook_attn_out"),
        ("resid_post_layer_4", "out", None),
        ("resid_pre_layer_3", "out", None),
        ("attn_layer_3", "in", None),
        ("mlp_out_layer3", "in_and_out", None),
        ("embed", "out", None),
        (None, "out", None),
    ],
)
def test_where_an_sae_of_dictionary_learning_reads(tmp_path, submodule, io, hook_name):
    """What its config says of the module and of its side, else refused: not the residual stream whatever it says."""
    weights = dictionary_weights("AutoEncoder", 16, 64)
    folder = write_dictionary(tmp_path / "a", "AutoEncoder", weights, 5, io=io, submodule_name=submodule)
    if hook_name:
        assert load_sae(folder).cfg.metadata.hook_name == hook_name
    else:
        with pytest.raises(
            UsageError, match=f"submodule_name {str(submodule)!r} with io '{io}' and layer 3 names no hook"
        ):
            load_sae(folder)


def test_what_is_not_read_of_dictionary_learning_is_named(tmp_path):
    folder = write_dictionary(tmp_path / "b", "AutoEncoder", dictionary_weights("AutoEncoder", 16, 64), 5)
    (folder / "config.json").write_text('{"trainer": {}, "buffer": {}}')
    with pytest.raises(DataError, match=r"cannot be read \(KeyError: 'layer'\)[.] Make or fetch it again"):
        load_sae(folder)
    write_dictionary(folder, "AutoEncoderNew", dictionary_weights("AutoEncoder", 16, 64), 5)
    with pytest.raises(UsageError, match="has the dict_class 'AutoEncoderNew'; only AutoEncoder, "):
        load_sae(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="ae.pt is a PyTorch file without the config.json .* save_model"):
        load_sae(folder)


@pytest.mark.parametrize("door", ["dictionary_learning", "release", "old SAELens", "ae.pt alone", "checkpoint"])
def test_a_pickle_runs_no_code(tmp_path, monkeypatch, door):
    """A PyTorch file that would write a file when unpickled is refused, and the file is not written."""
    folder, written = tmp_path / "x", tmp_path / "written"
    folder.mkdir()

    class Bomb:
        def __reduce__(self):
            return (open, (str(written), "w"))

    def read() -> object:
        return load_sae(folder)

    file = folder / "ae.pt"
    if door == "dictionary_learning":
        write_dictionary(folder, "AutoEncoder", dictionary_weights("AutoEncoder", 16, 64), 5)
    elif door == "release":  # one of SAELens' own
        from sae_lens.loading import pretrained_sae_loaders

        monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", lambda **_: str(file))
        read = lambda: load_sae("deepseek-r1-distill-llama-8b-qresearch:blocks.19.hook_resid_post")  # noqa: E731
    elif door == "old SAELens":  # before version 2 an SAE was one such file
        file = folder / "final_sparse_autoencoder_gpt2_blocks.2.hook_resid_pre_64.pt"
        (folder / "cfg.json").write_text("{}")
    elif door == "checkpoint":
        file = folder / "checkpoints" / "1" / "random.pt"
        file.parent.mkdir(parents=True)
        loop: Any = Loop.__new__(Loop)
        loop.out, loop.runs, loop.stream = folder, {}, SimpleNamespace(load=lambda _: None)
        read = loop.resume
    torch.save({"encoder.weight": Bomb()}, file)
    with pytest.raises(UsageError, match="cannot be read|holds no SAE|could not be loaded"):
        read()
    assert not written.exists()


def test_gemma_scope(tmp_path, monkeypatch):
    """Keys in either spelling; model, layer and site are in the names of the folders."""
    rng = np.random.default_rng(0)
    W_enc, W_dec = rng.normal(size=(16, 64)), rng.normal(size=(64, 16))
    arrays = {"b_enc": rng.normal(size=64), "b_dec": rng.normal(size=16), "threshold": np.abs(rng.normal(size=64))}
    arrays = {name: array.astype(np.float32) for name, array in (arrays | {"W_enc": W_enc, "w_dec": W_dec}).items()}
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    bare = tmp_path / "downloaded"
    for path in (folder, bare):
        path.mkdir(parents=True)
        np.savez(path / "params.npz", **arrays)
    sae, x = load_sae(folder), torch.randn(30, 16)
    w = {name: torch.from_numpy(array) for name, array in arrays.items()}
    pre = x @ w["W_enc"] + w["b_enc"]
    z = pre.relu() * (pre > w["threshold"])
    assert_is(sae, z, z @ w["w_dec"] + w["b_dec"], x)
    monkeypatch.chdir(folder)
    for metadata in (sae.cfg.metadata, load_sae(".").cfg.metadata):
        assert metadata.hook_name == "blocks.12.hook_resid_post" and metadata.model_name == "gemma-2-2b"
    with pytest.raises(UsageError, match="not found.*Keep its names: .*-res/layer_12/width_16k/"):
        load_sae(bare)


def test_openmoss_as_it_writes_now(tmp_path):
    """config.json, sae_weights.safetensors, a threshold per latent; the data's norm is not in the files."""
    weights = llama_scope_weights(16, 64)
    log_threshold = torch.randn(64, generator=torch.Generator().manual_seed(1)) - 1
    folder = tmp_path / "L15R"
    folder.mkdir()
    config = {"hook_point_in": "blocks.15.hook_resid_post", "d_model": 16, "expansion_factor": 4}
    (folder / "config.json").write_text(json.dumps(config | {"norm_activation": "inference"}))
    tensors = weights | {"log_jumprelu_threshold": log_threshold}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    x = torch.randn(30, 16)
    pre = x @ weights["encoder.weight"].T + weights["encoder.bias"]
    z = pre.relu() * (pre > log_threshold.exp())
    sae = load_sae(folder)
    assert_is(sae, z, z @ weights["decoder.weight"].T + weights["decoder.bias"], x)
    assert sae.cfg.normalize_activations == "none"
    (folder / "config.json").write_text(json.dumps(config))
    assert load_sae(folder).cfg.normalize_activations == "expected_average_only_in"


def test_llama_scope_without_its_hook_is_named(tmp_path):
    folder = write_llama_scope(tmp_path / "x", llama_scope_weights(16, 64), "blocks.8.hook_resid_post", "")
    theirs = json.loads((folder / "hyperparams.json").read_text())
    del theirs["hook_point_in"]
    (folder / "hyperparams.json").write_text(json.dumps(theirs))
    with pytest.raises(DataError, match=r"cannot be read \(KeyError: 'hook_point_in'\)"):
        load_sae(folder)


def test_sharded_safetensors(tmp_path, topk_sae):
    weights, x = sparsify_weights(16, 64), torch.randn(20, 16)
    folder = write_sparsify(tmp_path / "layers.3", weights, 4)
    sharded(folder / "sae.safetensors")
    assert_is(load_sae(folder), *sparsify_forward(weights, 4, x), x)
    topk_sae.save_model(tmp_path / "ours")
    sharded(tmp_path / "ours" / "sae_weights.safetensors")
    loaded, x = load_sae(tmp_path / "ours"), torch.randn(20, topk_sae.cfg.d_in)
    assert torch.equal(loaded(x), topk_sae(x))


# What SAELens 3 to 5 wrote: one level, and the older names of some settings.
OLDER = {
    3: {"hook_point": "blocks.2.hook_resid_post", "normalize_activations": False, "sae_lens_version": None},
    4: {"hook_name": "blocks.2.hook_resid_post", "normalize_activations": "none", "sae_lens_version": "4.4.5"},
    5: {"hook_name": "blocks.2.hook_resid_post", "normalize_activations": "none", "sae_lens_version": "5.11.0"},
}


@pytest.mark.parametrize("version", OLDER)
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_older_versions_of_saelens(tmp_path, version, activation):
    torch.manual_seed(0)
    weights = {
        "W_enc": torch.randn(16, 64),
        "b_enc": torch.randn(64),
        "W_dec": torch.randn(64, 16),
        "b_dec": torch.randn(16),
    }
    if version == 3:
        weights["scaling_factor"] = torch.ones(64)
    config = {"architecture": "standard", "d_in": 16, "d_sae": 64, "dtype": "torch.float32", "device": "cpu"}
    config |= {"activation_fn_str": activation, "activation_fn_kwargs": {"k": 4} if activation == "topk" else {}}
    config |= {"model_name": "gpt2-small", "context_size": 128, "prepend_bos": True, "apply_b_dec_to_input": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config | OLDER[version]))
    save_file(weights, tmp_path / "sae_weights.safetensors")
    sae, x = load_sae(tmp_path), torch.randn(20, 16)
    z = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    if activation == "topk":
        z = z * (z >= z.topk(4, dim=-1).values[:, -1:])
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            pytest.fail("the norm of the decoder did not count before SAELens 6")
    assert_is(sae, z, z @ weights["W_dec"] + weights["b_dec"], x)
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post" and sae.cfg.metadata.model_name == "gpt2-small"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.json": "{}"}, "not finished: run it again with --resume"),
        ({"run.json": "{}", "manifest.json": "{}"}, "it is a feature cache: give the SAE that it was built with"),
        ({"final_sae.pkl": ""}, "final_sae.pkl is a pickle, which can run code"),
        ({"hyperparams.json": "{}"}, "download that file too"),
        ({"cfg.json": "{}"}, "its weights .* are missing"),
        ({"model.safetensors": ""}, "model.safetensors has no configuration beside it"),
        ({"weights.npz": ""}, "weights.npz is no params.npz of Gemma Scope"),
        ({}, "give the folder of one SAE"),
    ],
)
def test_a_folder_without_an_sae_is_named_for_what_it_is(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=f"holds no SAE that can be read; .*{message}") as error:
        load_sae(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"d_in": "128"}, {"d_sae": 2.5}, {"d_sae": 10**9}, {"d_in": 0}, {"k": "8"}, {"k": -1}, {"k": None}, {"metadata": []},
        {"metadata": {"hook_name": 5}}, {"architecture": "nothing"}, {"architecture": 3}, {"dtype": "float33"}, {"dtype": 7},
        [], 5, "x", None, "6000 digits", "deep", "bytes", "cut",
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_cfg_json_is_one_line(tmp_path, topk_sae, mini, damage):
    topk_sae.save_model(tmp_path)
    file = tmp_path / "cfg.json"
    config = json.loads(file.read_text())
    written = json.dumps(config | damage if isinstance(damage, dict) else damage).encode()
    special = {"6000 digits": b'{"d_in": ' + b"9" * 6000 + b"}", "deep": b"[" * 100_000, "bytes": b"\xff\xfe\x00"}
    file.write_bytes(special.get(str(damage), file.read_bytes()[:40] if damage == "cut" else written))
    with pytest.raises(UsageError) as error:
        check_fits(load_sae(tmp_path), mini)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_name", [1], r"metadata.model_name in its cfg.json is \[1\]; a name was expected"),
        ("dataset_path", 3, "metadata.dataset_path in its cfg.json is 3; a name was expected"),
        ("context_size", -5, "metadata.context_size in its cfg.json is -5; a number of tokens, 2 or more"),
        ("context_size", "128", "metadata.context_size in its cfg.json is '128'"),
        ("k", 10**9, "has k 1,000,000,000, more than its 300 latents"),
        (
            "architecture",
            "sparse_topk",
            r"is a checkpoint of a training \(sparse_topk\); end it: .* --resume, or .*save_inference_model",
        ),
        ("architecture", "qwerty", "unknown architecture 'qwerty'; there are .*topk"),
    ],
)
def test_a_configuration_that_no_reader_can_use_is_refused_when_it_is_loaded(tmp_path, topk_sae, key, value, said):
    """Before, the list went to every command as if it were a model, and k and the context ended in a traceback."""
    topk_sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (config if key in config else config["metadata"])[key] = value
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=said):
        load_sae(tmp_path)


# --- the doors --------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_refused_at_every_door(tmp_path, topk_sae, mini, capsys):
    from sae_italian.cache import build_cache
    from sae_italian.cli import main
    from sae_italian.evaluation import evaluate
    from sae_italian.evaluation.diagnosis import export_jumprelu

    broken = copy.deepcopy(topk_sae)
    with torch.no_grad():
        broken.W_dec[3, :2] = torch.nan
    for door in (
        lambda: evaluate(broken, mini, "micro-italiano", n_tokens=100),
        lambda: build_cache(broken, mini, "micro-italiano", tmp_path / "cache", n_tokens=100),
        lambda: export_jumprelu(broken, mini, "micro-italiano", tmp_path / "jumprelu", n_tokens=100),
    ):
        with pytest.raises(DataError, match="2 numbers of W_dec are not finite. .*lower lr"):
            door()
    broken.save_model(tmp_path / "sae")
    for command in (["evaluate"], ["saes", "doctor"], ["saes", "show"]):
        assert main([*command, str(tmp_path / "sae")]) == 2
        said = capsys.readouterr()
        assert "2 numbers of W_dec are not finite" in said.out + said.err


def test_a_scale_that_is_not_folded_in_is_refused_at_every_door(tmp_path, topk_sae, mini):
    from sae_italian.analysis.latent import edit_hooks
    from sae_italian.cache import build_cache
    from sae_italian.evaluation import evaluate

    unfolded = copy.deepcopy(topk_sae)
    unfolded.cfg.normalize_activations = "expected_average_only_in"
    for door in (
        lambda: evaluate(unfolded, mini, "micro-italiano", n_tokens=100),
        lambda: build_cache(unfolded, mini, "micro-italiano", tmp_path / "cache", n_tokens=100),
        lambda: edit_hooks(unfolded, mini),
    ):
        with pytest.raises(UsageError, match="its scale is not folded in.*fold_activation_norm_scaling_factor"):
            door()
    unfolded.fold_activation_norm_scaling_factor(1.5)
    assert check_fits(unfolded, mini) == unfolded.cfg.metadata.hook_name


def test_an_sae_of_sparsify_is_refused_on_a_model_whose_hook_is_another_module(topk_sae, mini):
    """blocks.2.hook_resid_post is `model.layers.2` here; another model's may be another module's output."""
    sae = copy.deepcopy(topk_sae)
    sae.cfg.metadata.source_format, sae.cfg.metadata.hf_hook_name = "sparsify", "layers.2"
    assert check_fits(sae, mini)
    sae.cfg.metadata.hf_hook_name = "layers.2.mlp"
    with pytest.raises(UsageError, match="trained on the output of 'layers.2.mlp', but .* is 'model.layers.2'"):
        check_fits(sae, mini)


def test_an_sae_of_what_cannot_be_replaced_can_be_read_alone(topk_sae, mini):
    sae = copy.deepcopy(topk_sae)
    sae.cfg.metadata.hook_name = "blocks.2.ln2.hook_normalized"
    assert check_fits(sae, mini)
    with pytest.raises(UsageError, match="writes at blocks.2.ln2.hook_normalized, which can be read but not replaced"):
        check_fits(sae, mini, writes=True)


def test_a_hooked_transformer_is_refused_at_every_door(tmp_path, topk_sae):
    """Ours too, `load_model(name, "hooked")`: it ended in an AttributeError."""
    from sae_italian import build_cache, evaluate, load_model
    from sae_italian.analysis import ioi_pairs, ioi_score, steer, words_for

    model = load_model("sae-italian-mini", "hooked")
    pairs = ioi_pairs(2, model.tokenizer, words_for("sae-italian-mini"))
    for door in (
        lambda: evaluate(topk_sae, model, "micro-italiano", n_tokens=100),
        lambda: build_cache(topk_sae, model, "micro-italiano", tmp_path / "cache", n_tokens=100),
        lambda: steer(model, model.tokenizer, topk_sae, "Ciao", 0, [1.0]),
        lambda: ioi_score(model, model.tokenizer, pairs),
    ):
        with pytest.raises(UsageError, match="the model is a LoudHooked; give one of transformers, or its bridge"):
            door()


def test_a_bridge_does_what_the_model_of_transformers_does(topk_sae, mini):
    """Losses with the SAE in place, steered texts and choices; `build_cache` alone worked on one."""
    from sae_italian import evaluate, load_model
    from sae_italian.analysis import ablate, ioi_pairs, ioi_score, patch_saes, steer, words_for

    bridge = load_model("sae-italian-mini", "bridge")
    pairs = ioi_pairs(4, mini.tokenizer, words_for("sae-italian-mini"))
    cards, texts, scores, changes, patched = [], [], [], [], []
    for model in (mini, bridge):
        card = evaluate(topk_sae, model, "micro-italiano", n_tokens=500)
        cards.append([card.estimates()[key].value for key in ("explained_variance", "ce_loss", "ce_loss_with_sae")])
        steered = steer(model, model.tokenizer, topk_sae, "La ragazza", 0, [20.0], n_new_tokens=8)
        texts.append([one.text for one in (steered.unsteered, *steered.steered)])
        curve = patch_saes(model, model.tokenizer, {"": topk_sae}, pairs).as_dict()["curves"][0]
        patched.append([curve[key]["value"] for key in ("unpatched", "all_patched")])
        scores.append(ioi_score(model, model.tokenizer, pairs).difference.value)
        changes.append(ablate(model, model.tokenizer, topk_sae, "La ragazza mangia la mela.", 0).activations)
    assert cards[0] == pytest.approx(cards[1], abs=1e-4) and texts[0] == texts[1] and texts[0][0] != texts[0][1]
    assert patched[0] == pytest.approx(patched[1], abs=1e-3)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3) and changes[0] == pytest.approx(changes[1], abs=1e-4)


def test_a_device_may_be_torchs_own(trained_sae):
    assert load_sae(trained_sae, device=torch.device("cpu")).cfg.device == "cpu"


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows_is_refused(topk_sae, mini, monkeypatch):
    monkeypatch.setattr(mini.config, "vocab_size", 100)
    with pytest.raises(UsageError, match="tokenizer has .* tokens, the model 100 rows"):
        check_fits(topk_sae, mini)


def test_a_model_with_another_tokenizer_than_the_trainings_is_refused(trained_sae, mini, monkeypatch):
    """Of as many tokens or fewer, in rows of the same width: nothing else would notice. Added tokens are no difference."""
    from tests.corpora.test_packing import TOKENIZERS

    sae, own, tuned = load_sae(trained_sae), mini.tokenizer, copy.deepcopy(mini.tokenizer)
    tuned.add_special_tokens({"additional_special_tokens": ["<|utente|>"]})
    for tokenizer in (own, tuned):
        monkeypatch.setattr(mini, "tokenizer", tokenizer)
        monkeypatch.setattr(mini.config, "vocab_size", 10**6)
        assert check_fits(sae, mini) == "blocks.1.hook_resid_post"
    monkeypatch.setattr(mini, "tokenizer", TOKENIZERS["byte-level"])
    with pytest.raises(
        UsageError, match="other tokens than the one that the SAE was trained with; .*'sae-italian-mini'"
    ):
        check_fits(sae, mini)
    sae.cfg.metadata.vocabulary = None  # not ours, or of an earlier version: nothing is known
    assert check_fits(sae, mini)


@pytest.mark.parametrize(
    "command", [["saes", "list"], ["saes", "show", "typo"], ["saes", "show", "llama_scope_lxr:l0"]]
)
def test_names_are_answered_within_a_second(command):
    """Neither torch nor SAELens is imported for them; 8 and 12 s before."""
    code = (
        f"import sys; from sae_italian.cli import main; main({command!r});"
        "assert not {'torch', 'sae_lens', 'transformer_lens'} & set(sys.modules)"
    )
    assert any(fresh.told_in("-c", code)[1] < 1 for _ in range(3))
