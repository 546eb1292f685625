"""The same graph by circuit-tracer, which cannot be installed beside us but runs: pip install --no-deps --target DIR circuit-tracer==0.5.0

and CIRCUIT_TRACER=DIR. Its HookedTransformer serves as the other implementation, with TransformerLens' own hooks.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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


def theirs(saes, skip):
    """Return circuit-tracer's graph of the embedded model, its own attribute() on its own replacement model."""
    from circuit_tracer.attribution.attribute import attribute as attribute_theirs
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    hooked = load_model("sae-italian-mini", backend="hooked")
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
    model._configure_replacement_model(TranscoderSet(loaded, "mlp.hook_in", "mlp.hook_out"))
    return attribute_theirs(PROMPT, model, batch_size=32, max_feature_nodes=10_000), model


@pytest.mark.parametrize("skip", [False, True])
def test_our_edges_are_those_of_circuit_tracer(circuit_tracer, skip):
    model = load_model("sae-italian-mini")
    d_model, n_layers = model.config.hidden_size, model.config.num_hidden_layers
    saes = [random_transcoder(layer, skip=skip, d=d_model, d_sae=150, dtype="float32") for layer in range(n_layers)]
    for sae in saes:
        sae.b_enc.data -= 1.0  # fewer are active
    graph, _kept = theirs(saes, skip)
    ids = [target.vocab_idx for target in graph.logit_targets]
    mine = attribute(model, saes, PROMPT, logits=ids)
    features = graph.active_features[graph.selected_features].tolist()
    assert features == [[node.layer, node.position, node.index] for node in mine.nodes if node.kind == "latent"]
    n, n_pos = len(features), len(mine.tokens)
    n_errors = n_layers * n_pos
    matrix = graph.adjacency_matrix.double().numpy()
    rows = np.r_[0:n, n + n_errors + n_pos : len(matrix)]
    # at the first token we book the MLP's output as bias, they leave it out
    some = mine.of_kind("latent", "error", "embedding")
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
