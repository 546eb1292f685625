"""What a graph is shown as, whether it foretells the model, and the command."""

import json
import math

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_italian.base.errors import UsageError
from sae_italian.circuits.check import _agreement, check, foretold
from sae_italian.circuits.edges import attribute
from sae_italian.circuits.graph import Graph, GraphNode
from sae_italian.circuits.show import cantor, neuronpedia, summary, svg
from sae_italian.cli import main
from sae_italian.models.activations import read_activations
from tests.circuits.test_graph import mistral, random_transcoder  # noqa: F401

PROMPT = "La ragazza che vede i cani"
TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}


def fields(required: str, **of):
    return {"type": "object", "properties": of, "required": required.split()}


# The fields of Neuronpedia's graph-schema.json (apps/webapp/app/api/graph), their types and which it requires.
GENERATOR = fields("", name=TEXT, version=TEXT, url=TEXT, email=TEXT)
INFO = fields("", description=TEXT, creator_name=TEXT, create_time_ms=NUMBER, generator=GENERATOR)
SCHEMA = fields(
    "metadata qParams nodes links",
    metadata=fields(
        "slug scan prompt_tokens prompt",
        **{"slug": TEXT, "scan": TEXT, "prompt": TEXT, "node_threshold": NUMBER, "info": INFO},
        prompt_tokens={"type": "array", "items": TEXT},
        pruning_settings=fields("", node_threshold=NUMBER, edge_threshold=NUMBER),
    ),
    qParams=fields("", pinnedIds={"type": "array", "items": TEXT}, supernodes={"type": "array"}, linkType=TEXT),
    nodes={
        "type": "array",
        "items": fields(
            "node_id feature layer ctx_idx feature_type jsNodeId clerp",
            **{"node_id": TEXT, "feature_type": TEXT, "jsNodeId": TEXT, "clerp": TEXT, "ctx_idx": WHOLE},
            feature={"type": ["integer", "null"]},
            layer={"type": ["string", "integer"]},
            influence={"type": ["number", "null"]},
            activation={"type": ["number", "null"]},
        ),
    },
    links={"type": "array", "items": fields("source target weight", source=TEXT, target=TEXT, weight=NUMBER)},
)


def uncantor(number: int) -> tuple[int, int]:
    """Return layer and latent of the number that `cantor` makes of them, as circuit-tracer's page does."""
    both = (math.isqrt(8 * number + 1) - 1) // 2
    latent = number - both * (both + 1) // 2
    return both - latent, latent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Random transcoders of the embedded model's four layers, beside an SAE's folder that is none."""
    folder = tmp_path_factory.mktemp("suite")
    for layer in range(4):
        sae = random_transcoder(layer, d=128, d_sae=150, dtype="float32")
        sae.b_enc.data -= 3.0
        sae.cfg.metadata.model_name = "sae-italian-mini"
        sae.save_model(folder / f"L{layer}TC-1x")
    return folder


def test_neuronpedias_json_has_what_its_schema_requires(mistral):  # noqa: F811
    graph = attribute(mistral, [random_transcoder(layer) for layer in range(3)], "ciao bella", max_nodes=60)
    found = json.loads(json.dumps(neuronpedia(graph, "Ciao, bella!", {(1, 3): "saluti"})))
    jsonschema.validate(found, SCHEMA)
    assert set(found) == {"metadata", "qParams", "nodes", "links"} and found["metadata"]["slug"] == "ciao-bella"
    assert found["metadata"]["prompt_tokens"] == list(graph.tokens)
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    assert found["links"] and all({link["source"], link["target"]} <= set(ids) for link in found["links"])
    latents = [node for node in found["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert latents
    for node in latents:
        layer, index, position = map(int, node["node_id"].split("_"))
        assert (
            uncantor(node["feature"]) == (layer, index) and node["ctx_idx"] == position and node["layer"] == str(layer)
        )
        assert node["clerp"] == ("saluti" if (layer, index) == (1, 3) else "") and 0 < node["influence"] <= 1
    for node in found["nodes"]:
        if node["feature_type"] == "logit":
            assert "(p=" in node["clerp"] and node["is_target_logit"]
    weights = {(link["source"], link["target"]): link["weight"] for link in found["links"]}
    row = {target: row for row, target in enumerate(graph.targets.tolist())}
    for i, target in enumerate(graph.nodes):
        for j, source in enumerate(graph.nodes):
            if source.kind == target.kind == "latent":
                key = (
                    f"{source.layer}_{source.index}_{source.position}",
                    f"{target.layer}_{target.index}_{target.position}",
                )
                assert key not in weights or weights[key] == pytest.approx(graph.weights[row[i], j])


@given(st.integers(0, 200), st.integers(0, 10**6))
def test_one_number_names_a_latent_of_a_layer(layer, latent):
    assert uncantor(cantor(layer, latent)) == (layer, latent)


def test_the_summary_and_the_picture_name_what_matters(mistral):  # noqa: F811
    graph = attribute(mistral, [random_transcoder(layer) for layer in range(3)], "ciao")
    text, picture = summary(graph, {(0, 5): "spiegazione"}), svg(graph)
    assert "replacement score" in text and f"of {graph.n_active} active latents" in text
    assert picture.startswith("<?xml") and "next token" in picture and picture == svg(graph)


def test_all_paths_by_hand():
    """a writes 2 into b (active at 4) and 1 into the logit, b writes 8: without a, b halves, so the logit falls by 1 + 4."""
    nodes = (GraphNode("latent", 0, 1, 0, 1.0), GraphNode("latent", 1, 1, 0, 4.0), GraphNode("logit", 2, 1, 0, 1.0))
    weights = np.array([[0, 0, 0], [2.0, 0, 0], [1.0, 8.0, 0]])
    graph = Graph("p", "m", ("a", "b"), 2, nodes, np.arange(3), weights, weights.sum(1), 2)
    direct, paths = foretold(graph)
    assert direct.tolist() == [-1, -8, 0] and paths.tolist() == [-5, -8, 0]


def test_latents_of_the_last_layer_that_write_little_do_what_their_edges_say(mistral):  # noqa: F811
    """Nothing but the last norm lies behind them; what stands square on the residual stream leaves its scale alone."""
    sae, tokens = random_transcoder(2), mistral.tokenizer("ciao bella").input_ids
    residual = read_activations(mistral, tokens, "blocks.2.hook_resid_post")[0, -1]
    along = sae.W_dec.data @ residual / (residual @ residual)
    sae.W_dec.data = 1e-3 * (sae.W_dec.data - along[:, None] * residual)
    graph = attribute(mistral, [sae], "ciao bella")
    found = check(mistral, [sae], graph, n_latents=10)
    last = found.graph[0]
    assert (
        last.n == 10
        and last.direct.value > 0.99
        and last.paths == last.direct
        and last.slope.value == pytest.approx(1, abs=0.05)
    )
    assert len(found.random) == 2 and set(found.scores) == {"these", "random"} and found.verdict() in found.text()


def test_nothing_foretold_is_said():
    nothing = _agreement("x", np.zeros(5), np.zeros(5), np.arange(5.0), 0)
    assert np.isnan(nothing.direct.value) and np.isnan(nothing.slope.value)


def test_the_command_writes_a_graph_that_is_read_again(saved, tmp_path, capsys):
    out = tmp_path / "graph"
    assert main(["graph", "sae-italian-mini", str(saved), PROMPT, "max_nodes=50", "check=5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "replacement score" in said and "random transcoders" in said and "50 of" in said
    graph = Graph.load(out)
    assert graph.prompt == PROMPT and graph.of_kind("latent").sum() == 50
    assert np.abs(graph.weights.sum(axis=1) - graph.own).max() < 1e-3
    assert json.loads((out / "neuronpedia.json").read_text())["metadata"]["prompt"] == PROMPT
    again = ["graph", "sae-italian-mini", str(saved), PROMPT, "max_nodes=20", "--out", str(out)]
    assert main(again) == 2 and "max_nodes was 50, is now 20" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0 and Graph.load(out).of_kind("latent").sum() == 20
    graph = Graph.load(out)
    assert (out / "graph.svg").exists() and json.loads((out / "result.json").read_text())["n_active"] == graph.n_active


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=parola che ha tanti pezzi"], "one was expected"),
        (["max_nodes=0"], "max_nodes is"),
        (["nodes=5"], "no setting"),
        (["memory=0.0001"], "Use max_nodes="),
    ],
)
def test_bad_words_are_answered_in_a_line(saved, capsys, words, said):
    assert main(["graph", "sae-italian-mini", str(saved), PROMPT, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_holds_no_transcoders_is_told_how_to_train_some(tmp_path, capsys):
    assert main(["graph", "sae-italian-mini", str(tmp_path), PROMPT]) == 2
    assert "mini/transcoders" in capsys.readouterr().err


def test_an_sae_is_named_as_no_transcoder(topk_sae, mini):
    with pytest.raises(UsageError, match="a graph needs transcoders"):
        attribute(mini, [topk_sae], PROMPT)
