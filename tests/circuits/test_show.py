"""What a graph is shown as, whether it foretells the model, and the command."""

import json
import math
import re

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.circuits.check import check, foretold, replayed
from sae_italian.circuits.edges import Prompt, attribute
from sae_italian.circuits.graph import Graph, joined, nodes_of, prune
from sae_italian.circuits.show import cantor, graph_svg, neuronpedia, strongest_path, summary
from sae_italian.cli import main
from sae_italian.models.activations import read_activations
from sae_italian.saes import load_sae
from tests.browser.data_files import read_data
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
    assert (
        neuronpedia(graph, "È")["metadata"]["slug"] == "graph"
    )  # of letters that a slug does not take nothing is left
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


def test_the_last_edges_share_is_of_what_some_input_decides():
    places = (("embedding", -1), ("latent", 0), ("error", 0), ("bias", 0), ("logit", 1))
    nodes = joined([nodes_of(kind, layer, 1) for kind, layer in places])
    weights = np.array([[2.0, 0, 0, 3.0, 0], [1.0, 3.0, -1.0, 7.0, 0]])
    graph = Graph("p", "m", ("a", "b"), 1, nodes, np.array([1, 4]), weights, weights.sum(1), 1)
    assert strongest_path(graph) == ([0, 1, 4], 3 / 5)


@given(st.integers(0, 200), st.integers(0, 10**6))
def test_one_number_names_a_latent_of_a_layer(layer, latent):
    assert uncantor(cantor(layer, latent)) == (layer, latent)


def test_the_summary_and_the_picture_name_what_matters(mistral):  # noqa: F811
    graph = attribute(mistral, [random_transcoder(layer) for layer in range(3)], "ciao")
    text, picture = summary(graph, {(0, 5): "spiegazione"}), graph_svg(graph)
    assert "replacement score" in text and f"of {graph.n_active} active latents" in text
    assert picture.startswith("<?xml") and "next token" in picture and picture == graph_svg(graph)


def test_the_picture_draws_every_kind_of_node_that_stays():
    """Each input, latent, error, rest and logit is a point; the bias, which no input decides, is none."""
    places = (("embedding", -1), ("latent", 0), ("error", 0), ("bias", 0), ("rest", 0), ("logit", 1))
    nodes = joined([nodes_of(kind, layer, 1) for kind, layer in places])
    weights = np.array([[2.0, 0, 0, 3.0, 0, 0], [1.0, 3.0, 3.0, 7.0, 3.0, 0]])
    graph = Graph("p", "m", ("a", "b"), 1, nodes, np.array([1, 5]), weights, weights.sum(1), 1)
    kinds = prune(graph)[1].nodes.kind.tolist()
    drawn = re.findall(r'<g id="PathCollection_\d+">.*?</g>\s*</g>', graph_svg(graph), re.DOTALL)
    assert sorted(kinds) == ["embedding", "error", "latent", "logit", "rest"]
    assert sum(part.count("<use ") for part in drawn) == len(kinds)


def test_all_paths_by_hand():
    """a writes 2 into b (active at 4) and 1 into the logit, b writes 8: without a, b halves, so the logit falls by 1 + 4."""
    nodes = joined([nodes_of("latent", [0, 1], 1, 0, [1.0, 4.0]), nodes_of("logit", 2, 1, 0, 1.0)])
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
    assert found.replayed < 1e-6  # what is written twice, all else frozen, moves every target by its edge
    graph.weights[0] += 0.01 * np.abs(graph.weights).max()
    assert replayed(Prompt(mistral, [sae], "ciao bella"), graph) > 5e-3
    assert len(found.random) == 2 and set(found.scores) == {"these", "random"} and found.verdict() in found.text()


def test_what_is_written_twice_goes_on_through_skip_connections_too(mistral):  # noqa: F811
    saes = [random_transcoder(layer, skip=True) for layer in range(3)]
    graph = attribute(mistral, saes, "ciao bella")
    assert replayed(Prompt(mistral, saes, "ciao bella"), graph) < 1e-6


def test_a_graph_without_active_latents_foretells_nothing(mistral):  # noqa: F811
    sae = random_transcoder(1)
    sae.b_enc.data.fill_(-1000.0)
    graph = attribute(mistral, [sae], "ciao bella")
    found = check(mistral, [sae], graph)
    assert not len(graph.latents) and found.graph[0].n == 0 and math.isnan(found.graph[0].paths.value)
    assert found.verdict() in found.text()


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
    assert main([*again, "--overwrite", "minutes=1e-6", "batch=4"]) == 0
    assert "Note: edges: stopped by the time bound at 4 of 20" in capsys.readouterr().out
    assert Graph.load(out).of_kind("latent").sum() == 4  # a batch; the same command goes on
    assert main(again) == 0 and Graph.load(out).of_kind("latent").sum() == 20
    graph = Graph.load(out)
    assert (out / "graph.svg").exists() and json.loads((out / "result.json").read_text())["n_active"] == graph.n_active


def test_labels_come_from_the_caches_and_a_latents_page_links_back(saved, mini, tmp_path, capsys):
    """Transcoders, their cache, rules, graph, browser: every text on the page is the store's, every context the cache's."""
    one, cache, out = saved / "L0TC-1x", tmp_path / "caches" / "L0", tmp_path / "graph"
    build_cache(load_sae(one), mini, "micro-italiano", cache, n_tokens=4000, sae_name=str(one))
    assert main(["autointerp", str(cache), "--no-random-control", "--n-latents", "60"]) == 0
    told = ["graph", "sae-italian-mini", str(saved), PROMPT, "max_nodes=60", f"labels={cache.parent}"]
    assert main([*told, "--out", str(out)]) == 0 and capsys.readouterr().out
    page = (out / "index.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="graph-data">')[2].partition("</script>")[0])
    source = LatentSource(FeatureCache.open(cache), mini.tokenizer)
    nodes, n_told = data["nodes"], 0
    for kind, layer, index, text_it, text_en in zip(
        *(nodes[name] for name in ("kind", "layer", "index", "label_it", "label_en")), strict=True
    ):
        found = source.explained("rules", index) if kind == "latent" and layer == 0 else None
        assert (text_it, text_en) == ((found.text_it, found.text_en) if found else ("", ""))
        n_told += bool(text_it)
        for context in data["cards"].get(f"{layer}_{index}", {}).get("contexts", []):
            assert max(value for _, value in context["segments"]) >= context["max"] > 0
    assert n_told >= 3 and len(data["cards"]) >= n_told
    assert main(["browse", str(cache)]) == 0
    cards = [read_data(file) for file in sorted((cache.parent / "L0-report" / "data" / "cards").glob("*.js"))]
    cards = {int(latent): card for shard in cards for latent, card in shard["cards"].items()}
    linked = {latent: card["graphs"] for latent, card in cards.items() if card["graphs"]}
    graph = Graph.load(out)
    assert set(linked) == {node.index for node in graph.nodes if node.kind == "latent" and node.layer == 0}
    for latent, ((link,)) in linked.items():
        address, _, node = link["href"].partition("#node=")
        assert (cache.parent / "L0-report" / address).resolve() == out / "index.html" and link["prompt"] == PROMPT
        assert node.startswith(f"0_{latent}_")


READS = "blocks.{}.mlp.hook_in", "blocks.{}.ln2.hook_normalized"


def transcoders(folder, *kinds):
    """Save a transcoder of each (layer, width of the model, which site it reads)."""
    for number, (layer, d, site) in enumerate(kinds):
        sae = random_transcoder(layer, d=d, d_sae=60, dtype="float32")
        sae.b_enc.data -= 3.0
        sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = READS[site].format(layer), "altro/modello"
        sae.save_model(folder / f"T{number}")
    return folder


@pytest.mark.parametrize(
    ("kinds", "prompt", "words", "said"),
    [
        ([(0, 128, 0), (1, 128, 1)], PROMPT, [], "sites: mlp.hook_in in layer 0, ln2.hook_normalized in layer 1"),
        ([(0, 96, 0)], PROMPT, [], "the model has 128 at blocks.0.mlp.hook_in; it was trained on 'altro/modello'"),
        ([(0, 128, 0), (0, 128, 0)], PROMPT, [], "two transcoders are of layer 0"),
        ([(7, 128, 0)], PROMPT, [], "the model has layers 0 to 3"),
        ([], PROMPT, [], "this is an SAE"),
        ([(0, 128, 0)], "La", [], "fewer than two tokens"),
        ([(0, 128, 0)], "il " * 600, [], "positions. Use at most"),
        ([(0, 128, 0)], PROMPT, ["target=parola che ha tanti pezzi"], "one was expected"),
        ([(0, 128, 0)], PROMPT, ["against=il"], "needs target="),
        ([(0, 128, 0)], PROMPT, ["max_nodes=0"], "max_nodes is"),
        ([(0, 128, 0)], PROMPT, ["batch=-3"], "batch is"),
        ([(0, 128, 0)], PROMPT, ["nodes=5"], "no setting"),
        ([(0, 128, 0)], PROMPT, ["memory=0.00001"], "Use max_nodes="),
        ([(0, 128, 0)], PROMPT, ["memory=-1"], "memory is -1"),
        ([(0, 128, 0)], PROMPT, ["memory=nan"], "memory is nan"),
        ([(0, 128, 0)], PROMPT, ["target=il", "against=il"], "the token 'il' is explained less itself"),
        ([(0, 128, 0)], "agreement", ["study=1", "target=il"], "target= is for one graph"),
        ([(0, 128, 0)], "agreement", ["study=1", "memory=1e-6"], "Use max_nodes="),
        ([(0, 128, 0)], "nominativo", ["study=2"], "is no case and no file"),
        ([(0, 128, 0)], PROMPT, ["labels=."], "holds no feature cache"),
    ],
)
def test_bad_input_is_answered_in_a_line(topk_sae, tmp_path, monkeypatch, capsys, kinds, prompt, words, said):
    monkeypatch.chdir(tmp_path)
    folder = transcoders(tmp_path / "set", *kinds)
    if not kinds:
        topk_sae.save_model(folder)
    assert main(["graph", "sae-italian-mini", str(folder), prompt, *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1] and len(error) == 1 + any("altro" in line for line in error[:-1])


def test_a_gap_a_logit_never_likely_and_another_models_transcoders_are_told(mini, tmp_path, capsys):
    """None is refused: a layer without a transcoder is an error node, the other two are said."""
    with torch.no_grad():
        order = mini(mini.tokenizer(PROMPT, return_tensors="pt").input_ids).logits[0, -1].argsort().tolist()
    words = [piece[1:] for piece in mini.tokenizer.convert_ids_to_tokens(order) if piece.startswith("▁")]
    never = next(word for word in words if word.isalpha())
    folder = transcoders(tmp_path / "set", (0, 128, 0), (2, 128, 0))
    assert (
        main(["graph", "sae-italian-mini", str(folder), PROMPT, f"target={never}", "--out", str(tmp_path / "g")]) == 0
    )
    said = capsys.readouterr()
    assert "does not expect it" in said.out and "No transcoder of layer 1, 3:" in said.out
    assert "trained on 'altro/modello'" in said.err
    graph = Graph.load(tmp_path / "g")
    missing = np.array([node.kind == "error" and node.layer in (1, 3) for node in graph.nodes])
    assert {node.layer for node in graph.nodes if node.kind == "latent"} == {0, 2} and graph.weights[-1, missing].any()


def test_what_holds_no_transcoders_is_told_how_to_train_some(tmp_path, capsys):
    assert main(["graph", "sae-italian-mini", str(tmp_path), PROMPT]) == 2
    assert "mini/transcoders" in capsys.readouterr().err
