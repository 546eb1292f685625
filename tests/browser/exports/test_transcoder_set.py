"""A suite of transcoders for circuit-tracer: the files it opens, what it is refused, and its own reader where it is there."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sae_italian.cache import build_cache
from sae_italian.circuits.show import cantor
from sae_italian.cli import main
from sae_italian.saes import load_sae
from sae_italian.saes.architectures import TopKTranscoder, TopKTranscoderConfig
from tests.circuits.test_graph import random_transcoder

PLACE = os.environ.get("CIRCUIT_TRACER", "")
FIELDS = {"transcoder_id", "index", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max"}


def topk_transcoder(layer):
    sae = random_transcoder(layer, d=128, d_sae=150, dtype="float32")
    config = TopKTranscoderConfig(
        d_in=128, d_out=128, d_sae=150, k=8, metadata=sae.cfg.metadata, apply_b_dec_to_input=False
    )
    found = TopKTranscoder(config)
    found.load_state_dict({**found.state_dict(), **sae.state_dict()})
    return found


@pytest.fixture(scope="module")
def suite(mini, tmp_path_factory):
    """Four transcoders, the one of layer 1 a TopK; a feature cache of layer 0's."""
    folder = tmp_path_factory.mktemp("suite")
    for layer in range(4):
        sae = topk_transcoder(layer) if layer == 1 else random_transcoder(layer, d=128, d_sae=150, dtype="float32")
        sae.b_enc.data -= 3.0 * (layer != 1)
        sae.cfg.metadata.model_name, sae.cfg.metadata.dataset_path = "sae-italian-mini", "micro-italiano"
        sae.save_model(folder / f"L{layer}TC-1x")
    one = folder / "L0TC-1x"
    build_cache(load_sae(one), mini, "micro-italiano", folder / "caches" / "L0", n_tokens=3000, sae_name=str(one))
    return folder


@pytest.fixture(scope="module")
def exported(suite, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "set"
    told = ["export", str(suite), "--to", "transcoder-set", "--tokens", "3000", f"labels={suite / 'caches'}"]
    with redirect_stdout(io.StringIO()) as said:
        assert main([*told, "--out", str(out)]) == 0
    assert said.getvalue().endswith(f"\n\nNext: give {out} to circuit-tracer\n")
    return out


def test_the_weights_lie_as_circuit_tracer_names_them(suite, exported):
    config = yaml.safe_load((exported / "config.yaml").read_text())
    assert config["model_kind"] == "transcoder_set" and config["feature_input_hook"] == "mlp.hook_in"
    assert config["feature_output_hook"] == "hook_mlp_out" and config["model_name"] == "sae-italian-mini"
    for layer in range(4):
        found = load_file(exported / f"layer_{layer}.safetensors")
        assert found["W_enc"].shape == found["W_dec"].shape == (150, 128)
        assert ("activation_function.threshold" in found) == (layer == 1)
    plain, sae = load_file(exported / "layer_0.safetensors"), load_sae(suite / "L0TC-1x")
    x = torch.randn(20, 128)
    ours = sae.encode(x)
    theirs = torch.relu(x @ plain["W_enc"].T + plain["b_enc"])
    assert torch.allclose(ours, theirs, atol=1e-5) and (theirs > 0).any()
    assert torch.allclose(sae.decode(ours), theirs @ plain["W_dec"] + plain["b_dec"], atol=1e-4)


def test_features_are_found_by_their_offsets(exported):
    index = json.loads(gzip.decompress((exported / "features" / "index.json.gz").read_bytes()))
    assert list(index) == ["0"] and len(index["0"]["offsets"]) == 151
    data = (exported / "features" / index["0"]["filename"]).read_bytes()
    n_shown = 0
    for latent, (start, end) in enumerate(zip(index["0"]["offsets"], index["0"]["offsets"][1:], strict=False)):
        length = int.from_bytes(data[start : start + 4], "little")
        assert start + 4 + length == end
        record = json.loads(zlib.decompress(data[start + 4 : end]))
        assert record["index"] == latent and set(record) >= FIELDS
        for quantile in record["examples_quantiles"]:
            for example in quantile["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0
                n_shown += 1
    assert n_shown > 100


def test_what_circuit_tracer_cannot_hold_is_named(suite, tmp_path, capsys):
    for layer in (0, 2, 3):
        (tmp_path / "gap").mkdir(exist_ok=True)
        (tmp_path / "gap" / f"L{layer}").symlink_to(suite / f"L{layer}TC-1x")
    told = ["export", str(tmp_path / "gap"), "--to", "transcoder-set", "--out", str(tmp_path / "a")]
    assert main(told) == 2 and "no transcoder of layer 1" in capsys.readouterr().err
    wide = random_transcoder(1, d=128, d_sae=160, dtype="float32")
    wide.cfg.metadata.model_name, wide.cfg.metadata.dataset_path = "sae-italian-mini", "micro-italiano"
    wide.save_model(tmp_path / "gap" / "L1")
    told[-1] = str(tmp_path / "b")
    assert main(told) == 2 and "widths [150, 160]" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["export", str(tmp_path / "none"), "--to", "transcoder-set", "--out", str(tmp_path / "c")]) == 2
    assert "holds no transcoders" in capsys.readouterr().err


NEEDS_CIRCUIT_TRACER = pytest.mark.skipif(
    not (Path(PLACE) / "circuit_tracer").is_dir() or not PLACE,
    reason="circuit-tracer is absent: see tests/circuits/test_oracle.py",
)


@NEEDS_CIRCUIT_TRACER
def test_circuit_tracers_own_readers_open_it(exported, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ENABLE_HF_TRANSFER", False, raising=False)
    monkeypatch.syspath_prepend(PLACE)
    from circuit_tracer.frontend.feature_models import Model
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    read, config = load_transcoder_from_hub(str(exported.resolve()), dtype=torch.float32)
    assert len(read) == 4 and read.feature_input_hook == "mlp.hook_in" and config["scan"] == "set"
    x = torch.randn(30, 128)
    for layer in range(4):
        weights = load_file(exported / f"layer_{layer}.safetensors")
        pre = x @ weights["W_enc"].T + weights["b_enc"]
        threshold = weights.get("activation_function.threshold", torch.zeros(150))
        assert torch.allclose(read.encode_layer(x, layer), pre * (pre > threshold) * (pre > 0), atol=1e-5)
    index = json.loads(gzip.decompress((exported / "features" / "index.json.gz").read_bytes()))["0"]
    data = (exported / "features" / index["filename"]).read_bytes()
    assert Model.model_validate_json(zlib.decompress(data[4 : index["offsets"][1]])).transcoder_id == "layer_0"
    for name in [name for name in sys.modules if name.startswith("circuit_tracer")]:
        del sys.modules[name]


# circuit-tracer reads an index from the hub alone, by its page's script: here that script, and the disk as the hub.
READER = """
const fs = require("fs"), zlib = require("zlib"), [folder, assets, ...wanted] = process.argv.slice(1);
const chain = new Proxy(() => chain, { get: () => chain }), node = { html: () => node, append: () => node };
Object.assign(globalThis, {
  window: globalThis, location: { hostname: "" }, d3: chain, pako: { inflate: (bytes) => zlib.unzipSync(bytes).toString("utf-8") },
  fetch: async (url, { headers = {} } = {}) => {
    const bytes = fs.readFileSync(folder + url.slice(url.indexOf("/features/")));
    const [from, to] = (headers.Range || "bytes=0-").slice(6).split("-");
    const part = new Uint8Array(bytes.subarray(Number(from), to ? Number(to) + 1 : undefined));
    return { ok: true, status: 200, arrayBuffer: async () => part.buffer };
  },
});
for (const file of ["util.js", "feature_examples/init-feature-examples.js"]) (0, eval)(fs.readFileSync(assets + file, "utf-8"));
const { loadFeature } = initFeatureExamples({ containerSel: node, showLogits: false, showExamples: false });
Promise.all(wanted.map((number) => loadFeature("owner/set", Number(number)))).then((found) => console.log(JSON.stringify(found)));
"""


@NEEDS_CIRCUIT_TRACER
@pytest.mark.skipif(not shutil.which("node"), reason="node is absent: apt-get install nodejs")
def test_circuit_tracers_own_page_finds_a_latent_by_the_index(exported):
    latents, assets = (0, 17, 149), Path(PLACE) / "circuit_tracer" / "frontend" / "assets"
    told = ["node", "-e", READER, str(exported), f"{assets}/", *(str(cantor(0, latent)) for latent in latents)]
    done = subprocess.run(told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = json.loads(gzip.decompress((exported / "features" / "index.json.gz").read_bytes()))["0"]
    data = (exported / "features" / index["filename"]).read_bytes()
    for latent, read in zip(latents, json.loads(done.stdout), strict=True):
        record = json.loads(zlib.decompress(data[index["offsets"][latent] + 4 : index["offsets"][latent + 1]]))
        assert read["index"] == latent and {key: read[key] for key in record} == record
