"""The same graph by circuit-tracer, which cannot be installed beside us but runs: pip install --no-deps --target DIR circuit-tracer==0.5.0

and CIRCUIT_TRACER=DIR. Its HookedTransformer serves as the other implementation, with TransformerLens' own hooks.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from sae_italian.circuits.edges import attribute
from sae_italian.circuits.show import neuronpedia
from sae_italian.models import load_model
from tests.circuits.test_graph import random_transcoder

PLACE = os.environ.get("CIRCUIT_TRACER", "")
pytestmark = pytest.mark.skipif(
    not (Path(PLACE) / "circuit_tracer").is_dir() or not PLACE,
    reason="circuit-tracer is absent: see this file's first lines",
)
PROMPT = "La ragazza che vede i cani"


@pytest.fixture
def circuit_tracer(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ENABLE_HF_TRANSFER", False, raising=False)
    monkeypatch.syspath_prepend(PLACE)
    yield
    for name in [name for name in sys.modules if name.startswith("circuit_tracer")]:
        del sys.modules[name]


def embedded():
    """Return the embedded model, and TransformerLens' of it."""
    return load_model("sae-italian-mini"), load_model("sae-italian-mini", backend="hooked")


def gemma_2():
    """Return a random model in Gemma 2's shape, and TransformerLens' of the same weights: made of a config, without a hub.

    Both caps bite (scores and logits of a few units against caps of 2 and 5), and the local layers' window is 4 of 8 tokens.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    tokenizer = load_model("sae-italian-mini").tokenizer
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "sliding_window": 4}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(2)
    config = transformers.Gemma2Config(**shape, **heads, **caps, **special, max_position_embeddings=64)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config.architectures = ["Gemma2ForCausalLM"]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    local = [kind == "sliding_attention" for kind in config.layer_types or []]
    assert local == [True, False, True, False] and config._attn_implementation == "eager"
    cfg = HookedTransformerConfig(
        model_name="gemma-2",
        **{"n_layers": 4, "d_model": 48, "d_head": 16, "n_heads": 4, "n_key_value_heads": 2, "d_mlp": 96, "n_ctx": 64},
        **{"d_vocab": len(tokenizer), "eps": config.rms_norm_eps, "act_fn": "gelu_pytorch_tanh", "gated_mlp": True},
        **{"normalization_type": "RMS", "final_rms": True, "use_normalization_before_and_after": True},
        **{"positional_embedding_type": "rotary", "rotary_dim": 16, "rotary_base": 10_000.0, "window_size": 4},
        **{"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 5.0, "use_local_attn": True},
        attn_types=["local" if each else "global" for each in local],
    )
    hooked = HookedTransformer(cfg, tokenizer)
    hooked.load_state_dict(convert_gemma_weights(model, cfg), strict=False)
    model.tokenizer = tokenizer
    return model, hooked


def theirs(hooked, saes, skip, site):
    """Return circuit-tracer's graph of a model, its own attribute() on its own replacement model."""
    from circuit_tracer.attribution.attribute import attribute as attribute_theirs
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    loaded = {}
    for layer, sae in enumerate(saes):
        d_model, d_sae = sae.W_enc.shape
        its = SingleLayerTranscoder(d_model, d_sae, torch.relu, layer, skip_connection=skip, dtype=torch.float32)
        state = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
        its.load_state_dict(
            {key: value.float() for key, value in (state | ({"W_skip": sae.W_skip} if skip else {})).items()}
        )
        loaded[layer] = its
    model = TransformerLensReplacementModel(hooked.cfg, tokenizer=hooked.tokenizer)
    model.load_state_dict(hooked.state_dict(), strict=False)
    model._configure_replacement_model(TranscoderSet(loaded, site, "hook_mlp_out"))
    return attribute_theirs(PROMPT, model, batch_size=32, max_feature_nodes=10_000), model


@pytest.mark.parametrize(
    ("models", "skip", "site"),
    [
        (embedded, False, "mlp.hook_in"),
        (embedded, True, "mlp.hook_in"),
        (gemma_2, False, "mlp.hook_in"),
        (gemma_2, True, "ln2.hook_normalized"),
    ],
)
def test_our_edges_are_those_of_circuit_tracer(circuit_tracer, models, skip, site):
    model, hooked = models()
    tokens = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, hooked(tokens), atol=1e-4)  # one model, two libraries
    d_model, n_layers = model.config.hidden_size, model.config.num_hidden_layers
    saes = [random_transcoder(layer, skip=skip, d=d_model, d_sae=150, dtype="float32") for layer in range(n_layers)]
    for layer, sae in enumerate(saes):
        sae.b_enc.data -= 1.0  # fewer are active
        sae.cfg.metadata.hook_name = f"blocks.{layer}.{site}"
    graph, _kept = theirs(hooked, saes, skip, site)
    ids = [target.vocab_idx for target in graph.logit_targets]
    mine = attribute(model, saes, PROMPT, logits=ids)
    features = graph.active_features[graph.selected_features].tolist()
    assert features == [[node.layer, node.position, node.index] for node in mine.nodes if node.kind == "latent"]
    n, n_pos = len(features), len(mine.tokens)
    n_errors = n_layers * n_pos
    matrix = graph.adjacency_matrix.double().numpy()
    rows = np.r_[0:n, n + n_errors + n_pos : len(matrix)]
    # at the first token we book the MLP's output as bias, they leave it out
    some = np.concatenate([np.flatnonzero(mine.of_kind(kind)) for kind in ("latent", "error", "embedding")])
    scale = np.abs(matrix).max()
    assert np.abs(mine.weights[:, some] - matrix[np.ix_(rows, np.r_[0 : n + n_errors + n_pos])]).max() < 1e-4 * scale
    values = graph.activation_values[graph.selected_features].numpy()
    assert np.allclose([node.value for node in mine.nodes if node.kind == "latent"], values, rtol=1e-4, atol=1e-4)
    assert n > 200


def test_the_file_for_neuronpedia_is_read_by_circuit_tracers_own_model(circuit_tracer):
    from circuit_tracer.frontend.graph_models import Model

    model = load_model("sae-italian-mini")
    saes = [random_transcoder(layer, d=128, d_sae=150, dtype="float32") for layer in range(4)]
    found = neuronpedia(attribute(model, saes, PROMPT, max_nodes=100), PROMPT)
    read = Model.model_validate(found)
    assert len(read.nodes) == len(found["nodes"]) and len(read.links) == len(found["links"]) > 0
