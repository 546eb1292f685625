"""Foreign formats against their own maths, from disk and through `SAE.from_pretrained` with a local hub cache."""

import json
from typing import Any

import huggingface_hub
import pytest
import torch
from sae_lens import SAE

import sae_italian.plugin
from sae_italian.base.errors import DataError, UsageError
from sae_italian.models.catalogue import catalogue
from sae_italian.saes import load_sae
from sae_italian.saes.releases import LLAMA_SCOPE_MODEL, known_releases, loaders, releases
from tests import fresh
from tests.models.conftest import use_cache
from tests.models.hub import REVISION, put_in_cache
from tests.saes.formats import (
    llama_scope_forward,
    llama_scope_weights,
    sparsify_forward,
    sparsify_weights,
    write_llama_scope,
    write_sparsify,
)

CLIC_IT = "alessandrobondielli/sae-Minerva-1B-32x"


def assert_is(sae, z, y, x):
    assert (sae.encode(x) - z).abs().max() < 1e-6 * max(1, z.abs().max())
    assert (sae(x) - y).abs().max() < 1e-6 * max(1, y.abs().max())


def test_the_clic_it_release_is_exact_through_saelens_own_call(tmp_path, monkeypatch):
    """SAELens' call, our loader, sparsify's maths; real cfg.json keys, decoder of unit norm and a large bias."""
    weights, k = sparsify_weights(64, 64 * 32), 32
    write_sparsify(tmp_path / "run" / "layers.14", weights, k)
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({"model": "sapienzanlp/Minerva-1B-base-v1.0", "ctx_len": 512})
    )
    older, before = sparsify_weights(64, 64 * 32, seed=1), "0" * 40
    write_sparsify(tmp_path / "before" / "layers.14", older, k)
    put_in_cache(tmp_path / "hub", CLIC_IT, tmp_path / "before", before)
    put_in_cache(tmp_path / "hub", CLIC_IT, tmp_path / "run")
    use_cache(monkeypatch, tmp_path / "hub")
    sae = SAE.from_pretrained(CLIC_IT, "layers.14")
    x = 3 * torch.randn(50, 64) + 1
    assert_is(sae, *sparsify_forward(weights, k, x), x)
    metadata = sae.cfg.metadata
    assert metadata.hook_name == "blocks.14.hook_resid_post" and metadata.hf_hook_name == "layers.14"
    assert metadata.model_name == "sapienzanlp/Minerva-1B-base-v1.0" and metadata.context_size == 512
    assert metadata.revision == REVISION and sae.cfg.k == k
    put_in_cache(tmp_path / "hub", "someone/elsewhere", tmp_path / "run")
    for name, its, revision in (
        (f"{CLIC_IT}:layers.14", weights, REVISION),
        (f"{CLIC_IT}:layers.14@{before}", older, before),
        ("someone/elsewhere:layers.14", weights, REVISION),
    ):
        found = load_sae(name)
        assert_is(found, *sparsify_forward(its, k, x), x)
        assert found.cfg.metadata.revision == revision, name
        # whose files do not say it, where it is the older one
        assert found.cfg.metadata.model_name == "sapienzanlp/Minerva-1B-base-v1.0"
    with pytest.raises(UsageError, match="someone/elsewhere has no folder 'layers.77'; see https"):
        load_sae("someone/elsewhere:layers.77")


def test_of_an_sae_whose_settings_are_asked_for_nothing_else_is_fetched(tmp_path, monkeypatch):
    write_sparsify(tmp_path / "run" / "layers.14", sparsify_weights(16, 64), 4)
    put_in_cache(tmp_path / "hub", CLIC_IT, tmp_path / "run")
    use_cache(monkeypatch, tmp_path / "hub")
    asked, fetch = [], huggingface_hub.snapshot_download

    def fetched(repo_id: str, **how: Any) -> str:
        asked.append(how["allow_patterns"])
        return fetch(repo_id, **how)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    whole, settings = (each["sae_italian_sparsify"] for each in loaders())
    config, state, _ = whole(f"{CLIC_IT}@{REVISION}", "layers.14", "cpu", False, None)
    assert state["W_dec"].shape == (64, 16)
    metadata = settings(CLIC_IT, "layers.14", "cpu", False, None)["metadata"]
    assert metadata == config["metadata"] and metadata["repo_id"] == CLIC_IT and metadata["revision"] == REVISION
    assert metadata["model_name"] == "sapienzanlp/Minerva-1B-base-v1.0"  # which no file says
    assert asked == [["layers.14/*", "config.json"], ["layers.14/cfg.json", "config.json"]]


def test_saelens_own_converter_is_still_wrong(tmp_path):
    """If this fails, SAELens has mended its converter and ours may go."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    weights = sparsify_weights(16, 64)
    folder = write_sparsify(tmp_path / "layers.3", weights, 4)
    with pytest.raises(RuntimeError, match="W_dec"):
        SAE.load_from_disk(folder, converter=sparsify_disk_loader)


@pytest.mark.parametrize(
    ("hookpoint", "hook_name"),
    [
        ("layers.3", "blocks.3.hook_resid_post"),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("model.layers.3.self_attn", "blocks.3.hook_attn_out"),
        ("h.3", "blocks.3.hook_resid_post"),
        ("transformer.h.3.attn", "blocks.3.hook_attn_out"),
        ("gpt_neox.layers.3.mlp", "blocks.3.hook_mlp_out"),
    ],
)
def test_any_sparsify_or_delphi_folder_from_disk(tmp_path, hookpoint, hook_name):
    weights = sparsify_weights(16, 64, seed=3)
    folder = write_sparsify(tmp_path / "run" / hookpoint, weights, 4, expansion_factor=9)  # num_latents decides
    x = torch.randn(20, 16)
    for path in (folder, folder.parent):  # the hookpoint, or the run that Delphi is given
        sae = load_sae(path)
        assert sae.cfg.metadata.hook_name == hook_name
        assert_is(sae, *sparsify_forward(weights, 4, x), x)
    write_sparsify(tmp_path / "run" / "layers.9", weights, 4)
    with pytest.raises(UsageError, match="holds 2 SAEs"):
        load_sae(folder.parent)


@pytest.mark.parametrize(
    ("skip", "said_by"), [(False, "transcode"), (True, "transcode"), (True, "skip_connection"), (False, "run")]
)
def test_sparsify_transcoders(tmp_path, skip, said_by):
    weights = sparsify_weights(16, 64, skip=skip)
    folder = write_sparsify(tmp_path / "run" / "layers.3.mlp", weights, 4, transcode=said_by == "transcode")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"transcode": said_by == "run"}))
    sae, x = load_sae(folder), torch.randn(20, 16)
    assert_is(sae, *sparsify_forward(weights, 4, x, transcode=True), x)
    assert sae.cfg.metadata.hook_name == "blocks.3.mlp.hook_in"
    assert sae.cfg.metadata.hook_name_out == "blocks.3.hook_mlp_out"
    sae.save_model(tmp_path / "saved")
    again = load_sae(tmp_path / "saved")
    assert_is(again, *sparsify_forward(weights, 4, x, transcode=True), x)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("layers.3", {"signed": True}, "signed"),
        ("layers.3", {"activation": "groupmax"}, "groupmax"),
        ("lm_head", {}, "not a block"),
        ("layers.3", {"d_in": 17}, "W_enc"),
    ],
)
def test_what_saelens_cannot_express_is_refused(tmp_path, name, config, message):
    folder = write_sparsify(tmp_path / name, sparsify_weights(16, 64), 4, **config)
    with pytest.raises(UsageError, match=message):
        load_sae(folder)


def test_a_transposed_decoder_and_a_setting_that_is_not_there_are_named(tmp_path, monkeypatch):
    """Of a folder, and of a release, in whose loading SAELens stands between."""
    weights = sparsify_weights(16, 64)
    folder = write_sparsify(tmp_path / "layers.3", weights | {"W_dec": weights["W_dec"].T}, 4)
    use_cache(monkeypatch, tmp_path / "hub")
    put_in_cache(tmp_path / "hub", CLIC_IT, tmp_path)
    for name in (folder, f"{CLIC_IT}:layers.3"):
        with pytest.raises(DataError, match="W_dec .* transposed"):
            load_sae(name)
    config = json.loads((folder / "cfg.json").read_text())
    del config["k"]
    (folder / "cfg.json").write_text(json.dumps(config))
    put_in_cache(tmp_path / "hub", CLIC_IT, tmp_path)
    with pytest.raises(DataError, match=f"the SAE {CLIC_IT}:layers.3 cannot be read: its files lack 'k'"):
        load_sae(f"{CLIC_IT}:layers.3")


@pytest.fixture
def llama_scope_hub(tmp_path, monkeypatch):
    """An SAE and a transcoder with the published hyperparameters' form, in a hub cache."""
    use_cache(monkeypatch, tmp_path / "hub")
    made = {}
    for kind, hook_in, norm_in in (("R", "hook_resid_post", 3.0), ("TC", "ln2.hook_normalized", 8.0)):
        hook_out = "blocks.8.hook_resid_post" if kind == "R" else "blocks.8.hook_mlp_out"
        weights = llama_scope_weights(64, 256)
        if kind == "TC":  # an SAE's decoder is of unit norm
            weights["decoder.weight"] = weights["decoder.weight"] * torch.linspace(0.5, 2, 256)
        folder = tmp_path / kind / f"Llama3_1-8B-Base-L8{kind}-8x"
        norms = {"in": norm_in, "out": 3.0}
        write_llama_scope(folder, weights, f"blocks.8.{hook_in}", hook_out, dataset_average_activation_norm=norms)
        put_in_cache(tmp_path / "hub", f"fnlp/Llama3_1-8B-Base-LX{kind}-8x", tmp_path / kind)
        made[kind] = (weights, norm_in)
    return made


def test_llama_scope_transcoders(llama_scope_hub):
    weights, norm_in = llama_scope_hub["TC"]
    sae = SAE.from_pretrained("llama_scope_lxtc_8x", "l8tc_8x")
    x = torch.randn(40, 64)
    z, y = llama_scope_forward(weights, x, norm_in, 3.0, 0.1)
    assert 0 < (z != 0).sum(-1).float().mean() < 256
    assert_is(sae, z, y, x)
    assert sae.cfg.metadata.hook_name == "blocks.8.ln2.hook_normalized"
    assert sae.cfg.metadata.hook_name_out == "blocks.8.hook_mlp_out" and sae.cfg.metadata.k == 50


def test_llama_scope_saes_by_saelens_loader_and_by_ours_are_one(llama_scope_hub, tmp_path):
    weights, norm = llama_scope_hub["R"]
    x = torch.randn(40, 64)
    z, y = llama_scope_forward(weights, x, norm, 3.0, 0.1)
    assert_is(load_sae(tmp_path / "R" / "Llama3_1-8B-Base-L8R-8x"), z, y, x)
    from sae_lens.loading.pretrained_sae_loaders import llama_scope_sae_huggingface_loader

    from sae_italian.saes.foreign import LLAMA_SCOPE

    config, theirs, _ = llama_scope_sae_huggingface_loader(
        "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L8R-8x", cfg_overrides={"dtype": "float32"}
    )
    _, ours = LLAMA_SCOPE.read(tmp_path / "R" / "Llama3_1-8B-Base-L8R-8x")
    assert config["normalize_activations"] == "expected_average_only_in"
    assert torch.allclose(theirs["threshold"], ours["threshold"], rtol=1e-5)
    assert torch.allclose(theirs["W_enc"] * 8 / norm, ours["W_enc"], rtol=1e-5)


def test_llama_scope_whose_scale_is_folded_in_reads_raw_activations(tmp_path):
    weights, x = llama_scope_weights(64, 256), torch.randn(40, 64)
    folder = write_llama_scope(tmp_path, weights, *2 * ["blocks.8.hook_resid_post"], norm_activation="inference")
    assert_is(load_sae(folder), *llama_scope_forward(weights, x, 8.0, 8.0, 0.1), x)  # of norm sqrt(64) as it is


def test_llama_scopes_weights_of_half_precision_are_scaled_in_full(tmp_path):
    weights, x = {name: each.bfloat16() for name, each in llama_scope_weights(64, 256).items()}, torch.randn(40, 64)
    folder = write_llama_scope(tmp_path, weights, *2 * ["blocks.8.hook_resid_post"])
    whole = {name: each.float() for name, each in weights.items()}
    assert_is(load_sae(folder), *llama_scope_forward(whole, x, 8.0, 3.0, 0.1), x)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_activation", "token-wise"),  # each token's own factor: no weights can hold it
        ("sparsity_include_decoder_norm", False),
        ("apply_decoder_bias_to_pre_encoder", True),
        ("use_glu_encoder", True),
        ("act_fn", "topk"),
    ],
)
def test_what_llama_scopes_published_saes_do_not_have_is_refused(tmp_path, key, value):
    hooks = ["blocks.8.hook_resid_post"] * 2
    folder = write_llama_scope(tmp_path, llama_scope_weights(16, 64), *hooks, **{key: value})
    with pytest.raises(UsageError, match=f"has {key} {value!r}; only "):
        load_sae(folder)


def test_all_256_llama_scope_saes_are_known():
    rows = {row["release"]: row for row in known_releases()}
    ids = [sae_id for name, row in rows.items() if name.startswith("llama_scope_lx") for sae_id in row["ids"]]
    assert len(ids) == len(set(ids)) == 256
    assert sum("tc_" in sae_id for sae_id in ids) == 64
    assert rows["llama_scope_lxr_32x"]["d_sae"] == 131072 and rows["llama_scope_lxr_32x"]["site"] == "R"
    assert {row["model"] for row in rows.values()} <= {entry.name for entry in catalogue().values()} | {
        LLAMA_SCOPE_MODEL
    }
    assert rows[CLIC_IT]["d_sae"] == 65536 and "layers.14" in rows[CLIC_IT]["ids"]


@pytest.mark.parametrize("first", ["sae_italian, sae_lens", "sae_lens, sae_italian"])
def test_registration_in_both_orders_is_idempotent_and_replaces_nothing(first):
    code = f"""import {first}
from sae_lens.loading import pretrained_sae_loaders as l, pretrained_saes_directory as d
import sae_italian.plugin as p
table = d.get_pretrained_saes_directory(); n = len(table); size = len(l.NAMED_PRETRAINED_SAE_LOADERS)
sparsify = l.NAMED_PRETRAINED_SAE_LOADERS['sparsify']
p.register_saes(); p.install()
assert table is d.get_pretrained_saes_directory() and len(table) == n and 'llama_scope_lxtc_8x' in table
assert size == len(l.NAMED_PRETRAINED_SAE_LOADERS) and l.NAMED_PRETRAINED_SAE_LOADERS['sparsify'] is sparsify
d.get_pretrained_saes_directory.cache_clear(); fresh = d.get_pretrained_saes_directory()
assert all(table[k] == v for k, v in fresh.items()), 'a release of SAELens was replaced'
print(len(table) - len(fresh))"""
    done = fresh.run(["-c", code])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(releases())


def test_a_release_that_saelens_has_is_not_taken_over():
    table = {"mine": 1}
    sae_italian.plugin._add("release", table, {"mine": 1, "other": 2})
    assert table == {"mine": 1, "other": 2}
    with pytest.raises(ValueError, match="not replaced"):
        sae_italian.plugin._add("release", table, {"mine": 3})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama_scope_lxtc_9x:l0tc_9x", "Did you mean 'llama_scope_lxtc_8x'"),
        ("llama_scope_lxtc_8x:l99tc_8x", "has no SAE"),
        (f"{CLIC_IT}:layers.99", "has no SAE 'layers.99'. Did you mean 'layers.9'"),
        (f"{CLIC_IT}:layers.14", "hf download alessandrobondielli/sae-Minerva-1B-32x"),
        ("someone/somewhere:layers.1", "hf download someone/somewhere"),
        ("nothing", "neither a folder nor"),
    ],
)
def test_an_sae_that_is_not_there_says_what_to_do(name, message, empty_hub):
    with pytest.raises(UsageError, match=message) as error:
        load_sae(name)
    assert "\n" not in str(error.value)
