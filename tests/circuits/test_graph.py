"""Attribution graphs against what they must add up to, and against the model itself."""

import numpy as np
import pytest
import torch
import transformers
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import time_bound
from sae_italian.circuits.check import check, random_graph
from sae_italian.circuits.edges import Prompt, _Rows, attribute
from sae_italian.circuits.graph import NODE, Graph, influence, joined, nodes_of, prune, scores
from sae_italian.circuits.linear import Linear, Targets

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}


class Letters:
    """A tokenizer of the test: a token a character, token 0 first."""

    all_special_ids = [0]
    bos_token_id, eos_token_id = 0, None

    def __call__(self, text, return_tensors=None, **_):
        ids = torch.tensor([[0, *(ord(letter) % 96 + 1 for letter in text)]])
        return type("Ids", (), {"input_ids": ids})


FAMILIES = {
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2}),
    "gemma2": (transformers.Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4}),
    "olmo2": (transformers.Olmo2Config, {}),
}


def random_model(family, monkeypatch):
    kind, more = FAMILIES[family]
    torch.manual_seed(1)
    config = kind(**(SIZES | more), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    model.config.architectures = [type(model).__name__]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.tokenizer = Letters()
    monkeypatch.setattr("sae_italian.circuits.edges.token_text", lambda _, ids: [f"t{int(i)}" for i in ids])
    monkeypatch.setattr("sae_italian.circuits.edges.special", lambda tokens, _: tokens == 0)
    return model


def random_transcoder(layer, *, skip=False, seed=0, d=32, d_sae=40, dtype="float64"):
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.mlp.hook_in", hook_name_out=f"blocks.{layer}.hook_mlp_out")
    config, kind = (SkipTranscoderConfig, SkipTranscoder) if skip else (TranscoderConfig, Transcoder)
    sae = kind(config(d_in=d, d_out=d, d_sae=d_sae, dtype=dtype, metadata=metadata, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(100 * seed + layer)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return sae


def named(node):
    """Return kind, layer, position and index of a node."""
    return node.item()[:4]


def place(node):
    return node.item()[1:4]


@pytest.fixture(params=FAMILIES)
def model(request, monkeypatch):
    return random_model(request.param, monkeypatch)


def test_every_row_adds_up_to_its_target(model):
    """W_enc . x, and the centred logit: from the model's own activations, not from the graph."""
    from sae_italian.models.activations import read_activations

    saes = [random_transcoder(layer) for layer in range(3)]
    graph = attribute(model, saes, "ciao bella")
    tokens = model.tokenizer("ciao bella").input_ids
    assert np.allclose(graph.weights.sum(axis=1), graph.own, atol=1e-9)
    logits = model(tokens).logits[0, -1]
    for row, target in enumerate(graph.targets.tolist()):
        node = graph.nodes[target]
        if node.kind == "logit":
            assert node.value == pytest.approx(float(logits.softmax(-1)[node.index]), rel=1e-5)  # Gemma 2's capped
        if node.kind == "latent":
            x = read_activations(model, tokens, f"blocks.{node.layer}.mlp.hook_in")[0, node.position]
            expected = float(x @ saes[node.layer].W_enc[:, node.index].detach())
            assert node.value == pytest.approx(expected + float(saes[node.layer].b_enc[node.index].detach()), abs=1e-5)
        elif getattr(model.config, "final_logit_softcapping", None) is None:
            expected = float(logits[node.index] - logits.mean())
        else:
            continue
        assert graph.own[row] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    constant = graph.weights[:, graph.of_kind("constant")]
    if model.config.model_type in ("mistral", "gemma2", "gemma3", "olmo2"):  # no bias in attention or norms
        assert np.abs(constant).max() < 1e-5 * np.abs(graph.own).max()


def test_an_edge_is_what_the_target_moves_by(model):
    """Everything frozen, a latent, an error or an input written twice: each target moves by its edge from it."""
    saes = [random_transcoder(layer) for layer in (0, 1, 2)]
    graph = attribute(model, saes, "ciao bella")
    tokens = model.tokenizer("ciao bella").input_ids
    hooks = {layer: f"blocks.{layer}.mlp.hook_in" for layer in range(3)}
    before = Linear(model, tokens, hooks)
    whole = before.leaves[0][0].detach()
    unembedding = model.get_output_embeddings().weight
    rng = np.random.default_rng(0)
    some = [rng.choice(np.flatnonzero(graph.of_kind(*kinds)), 8) for kinds in (("latent",), ("error", "embedding"))]
    for column in np.concatenate(some).tolist():
        node = graph.nodes[column]
        if node.position == 0:
            continue  # the MLP's output at the first token is a bias
        added = torch.zeros(tokens.shape[1], 32, dtype=torch.float64)
        if node.kind == "latent":
            added[node.position] = node.value * saes[node.layer].W_dec[node.index].detach()
        elif node.kind == "error":
            sae, read = saes[node.layer], before.reads[node.layer][0, node.position].detach()
            added[node.position] = before.written[node.layer][0, node.position] - sae(read).detach()
        else:
            added[node.position] = whole[node.position]
        after = Linear(model, tokens, hooks, before=before, added={node.layer: added})
        for row, target in enumerate(graph.targets.tolist()):
            to = graph.nodes[target]
            moved = (after.reads[to.layer] - before.reads[to.layer])[0, to.position]
            vector = (
                saes[to.layer].W_enc[:, to.index]
                if to.kind == "latent"
                else unembedding[to.index] - unembedding.mean(0)
            )
            assert graph.weights[row, column] == pytest.approx(float(moved @ vector), rel=1e-6, abs=1e-9)


def test_the_frozen_pass_is_the_models_own(model):
    tokens = model.tokenizer("ciao bella").input_ids
    name = model.config._attn_implementation
    linear = Linear(model, tokens, {})
    final = linear.reads[3]
    logits = model(tokens).logits
    mine = torch.nn.functional.linear(final, model.get_output_embeddings().weight)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        mine = cap * torch.tanh(mine / cap)
    assert torch.allclose(mine, logits, atol=1e-5)
    assert model.config._attn_implementation == name  # left as it was found
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def mistral(monkeypatch):
    return random_model("mistral", monkeypatch)


def test_the_batch_does_not_matter_and_latents_left_out_are_booked(mistral):
    saes = [random_transcoder(layer) for layer in range(3)]
    whole, *others = (attribute(mistral, saes, "ciao bella", batch=batch) for batch in (1, 5, 64))
    assert _Rows(Prompt(mistral, saes, "ciao bella"), 10**9, None).batch == 128, "as many gradients fill no memory"
    n_latents = int(whole.of_kind("latent").sum())
    bounded = attribute(mistral, saes, "ciao bella", max_nodes=n_latents, batch=16)
    for other in (*others, bounded):
        values, expected = other.nodes.value, whole.nodes.value
        assert values == pytest.approx(expected, rel=1e-12)  # a product's last bit may hang on where its memory lies
        assert all((other.nodes[name] == whole.nodes[name]).all() for name in NODE.names if name != "value")
        assert np.allclose(other.weights, whole.weights, atol=1e-10)
    few = attribute(mistral, saes, "ciao bella", max_nodes=20, batch=4)
    assert few.of_kind("latent").sum() == 20 and few.n_active == whole.of_kind("latent").sum()
    assert np.allclose(few.weights.sum(axis=1), few.own, atol=1e-9)
    assert (
        np.abs(few.weights[:, few.of_kind("constant")]).max() < 1e-5
    )  # the rest is in the rest nodes, not in the constant
    rest = few.weights[-1, few.of_kind("rest")]
    kept = {place(node) for node in few.nodes if node.kind == "latent"}
    for layer in range(3):
        left = [
            i
            for i, node in enumerate(whole.nodes)
            if node.kind == "latent" and node.layer == layer and place(node) not in kept
        ]
        assert rest[layer] == pytest.approx(whole.weights[-1, left].sum(), abs=1e-9)
    # what is most influential comes first: the twenty hold more influence than twenty others
    reach = influence(whole)
    mine = [reach[i] for i, node in enumerate(whole.nodes) if node.kind == "latent" and place(node) in kept]
    assert np.mean(mine) > 1.5 * np.mean(reach[whole.of_kind("latent")])


def test_early_targets_go_back_through_the_prompts_beginning(model, monkeypatch):
    """Passes of 3, 6, 9 and all 11 tokens give what the whole prompt's alone gives, in every family."""
    import sae_italian.circuits.edges as edges

    saes, lengths, frozen = [random_transcoder(layer) for layer in range(3)], [], edges.Prompt.frozen
    whole = attribute(model, saes, "ciao bella")
    monkeypatch.setattr(edges, "SHORT", 3)
    monkeypatch.setattr(edges.Prompt, "frozen", lambda *a, **k: (lengths.append(a[1]), frozen(*a, **k))[1])
    parts = attribute(model, saes, "ciao bella", batch=4)
    assert sorted(lengths) == [3, 6, 9, 11]
    assert (parts.nodes == whole.nodes).all() and np.allclose(parts.weights, whole.weights, rtol=1e-5, atol=1e-6)


def test_the_graph_has_no_cycle_and_looks_back_only(mistral):
    graph = attribute(mistral, [random_transcoder(layer) for layer in range(3)], "ciao bella")
    for row, target in enumerate(graph.targets.tolist()):
        to = graph.nodes[target]
        for column in np.flatnonzero(np.abs(graph.weights[row]) > 1e-12).tolist():
            source = graph.nodes[column]
            if source.kind in ("latent", "error", "bias"):
                assert source.layer < to.layer and source.position <= to.position
            assert source.kind != "logit"


def test_a_gap_and_no_transcoder_at_all_leave_a_true_graph(mistral):
    gap = attribute(mistral, [random_transcoder(0), random_transcoder(2)], "ciao")
    assert np.allclose(gap.weights.sum(axis=1), gap.own, atol=1e-9)
    assert {node.layer for node in gap.nodes if node.kind == "latent"} == {0, 2}
    zero = [random_transcoder(layer) for layer in range(3)]
    for sae in zero:
        sae.W_enc.data.zero_(), sae.b_enc.data.fill_(-1), sae.b_dec.data.zero_()
    silent = attribute(mistral, zero, "ciao")
    none = attribute(mistral, [], "ciao")
    assert (silent.nodes == none.nodes).all() and np.allclose(silent.weights, none.weights, atol=1e-12)
    assert not none.of_kind("latent").any() and np.allclose(none.weights.sum(axis=1), none.own, atol=1e-9)
    # without latents the score is the direct path's share: |inputs| / (|inputs| + |errors|) of the logits' rows
    p = np.array([node.value for node in none.nodes if node.kind == "logit"])
    size = np.abs(none.weights)
    direct, errors = (size[:, none.of_kind(kind)].sum(axis=1) for kind in ("embedding", "error"))
    share = (p * direct / (direct + errors)).sum() / p.sum()
    assert scores(none).replacement == pytest.approx(share) == scores(none).completeness


class Identity(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return x @ self.width


def test_a_transcoder_that_is_its_mlp_leaves_no_error(mistral):
    """MLPs made linear, y = x W; latents 2 d: relu(x) and relu(-x), decoded by W and -W."""
    saes = []
    for layer in range(3):
        block = mistral.model.layers[layer]
        width = 0.2 * torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
        block.mlp = Identity(width)
        sae = random_transcoder(layer, d_sae=64)
        eye = torch.eye(32, dtype=torch.float64)
        sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([width, -width])
        sae.b_enc.data.zero_(), sae.b_dec.data.zero_()
        saes.append(sae)
    graph = attribute(mistral, saes, "ciao bella")
    assert np.abs(graph.weights[:, graph.of_kind("error")]).max() < 1e-12
    found = scores(graph)
    assert found.replacement == pytest.approx(1, abs=1e-9) and found.completeness == pytest.approx(1, abs=1e-9)
    assert found.visited == 1


def test_a_skip_connection_is_neither_latent_nor_error(mistral):
    saes = [random_transcoder(layer, skip=True) for layer in range(3)]
    graph = attribute(mistral, saes, "ciao bella")
    assert np.allclose(graph.weights.sum(axis=1), graph.own, atol=1e-9)
    assert np.abs(graph.weights[:, graph.of_kind("constant")]).max() < 1e-4


def test_a_planted_latent_against_a_logit_has_its_edge_by_hand(mistral):
    """The last MLP's decoder is minus a logit's direction: the edge is minus activation times what the norm passes on."""
    sae = random_transcoder(2)
    weight = mistral.get_output_embeddings().weight.detach()
    direction = weight[7] - weight.mean(0)
    mistral.model.norm.weight.data.abs_()
    sae.W_dec.data[:] = 0
    sae.W_dec.data[3] = -direction
    sae.b_enc.data[3] = 5.0
    graph = attribute(mistral, [sae], "ciao", logits=[7])
    column = next(i for i, n in enumerate(graph.nodes) if named(n) == ("latent", 2, len(graph.tokens) - 1, 3))
    tokens = mistral.tokenizer("ciao").input_ids
    before_norm = Linear(mistral, tokens, {}).scales["model.norm"][0, -1]
    expected = -graph.nodes[column].value * float(
        (direction * mistral.model.norm.weight.detach() * before_norm) @ direction
    )
    assert graph.weights[-1, column] == pytest.approx(expected, rel=1e-6) and expected < 0


def test_pruning_keeps_what_it_says(mistral):
    graph = attribute(mistral, [random_transcoder(layer) for layer in range(3)], "ciao bella")
    keep, small = prune(graph, 0.6, 0.9)
    reach = influence(graph)
    some = graph.of_kind("latent", "error")
    assert 0 < keep[some].sum() < some.sum()
    assert reach[keep].sum() >= 0.55 * reach.sum()
    assert keep[graph.of_kind("embedding", "logit")].all() and not keep[graph.of_kind("bias", "constant")].any()
    assert (small.nodes == graph.nodes[keep]).all() and small.weights.shape == (len(small.targets), keep.sum())
    assert {*small.latents.tolist()} <= {*small.targets.tolist()}
    assert small.weights.any(axis=1).all() and small.weights[:, small.latents].any(axis=0).all()
    everything, _ = prune(graph, 1.0, 1.0)
    assert everything[some & (reach > 0)].all()


def test_influence_by_hand():
    """a -> b -> logit with shares 1/4 and 1/2: b has 1/2, a has 1/2 of it through b and the direct half."""
    nodes = joined(
        [nodes_of("latent", [0, 1], 0, 0, 1.0), nodes_of("embedding", -1, 0), nodes_of("logit", 2, 0, 0, 1.0)]
    )
    weights = np.array([[0, 0, 2.0, 0], [1, 0, -3.0, 0], [2, -2, 0, 0]], dtype=float)
    graph = Graph("p", "m", ("t",), 2, nodes, np.array([0, 1, 3]), weights, weights.sum(1), 2)
    # b: 1/2; a: 1/2 + 1/2 * 1/4 = 5/8; the token: all of a, 3/4 of b
    assert influence(graph) == pytest.approx([5 / 8, 1 / 2, 5 / 8 + 3 / 8, 0])
    assert scores(graph).replacement == 1
    # half of what edges pass on is token -> a (5/8 of 17/8) and a -> logit; b, left without an edge, goes
    keep, small = prune(graph, 1.0, 0.5)
    assert keep.tolist() == [True, False, True, True] and small.targets.tolist() == [0, 2]
    assert small.weights.tolist() == [[0, 2, 0], [2, 0, 0]]
    assert [column.tolist() for column in small.edges()] == [[0, 2], [1, 0], [2, 2]]  # targets, sources, weights


def test_what_was_not_visited_counts_as_an_error():
    nodes = joined([nodes_of("embedding", -1, 0), nodes_of("rest", 0), nodes_of("logit", 1, 0, 0, 1.0)])
    weights = np.array([[1.0, -3.0, 0.0]])
    assert scores(Graph("p", "m", ("t",), 1, nodes, np.array([2]), weights, weights.sum(1), 4)) == (1 / 4, 1 / 4, 0)


def test_a_graph_comes_back_as_it_was_written(mistral, tmp_path, monkeypatch):

    graph = attribute(mistral, [random_transcoder(1)], "ciao")
    graph.save(tmp_path)
    back = Graph.load(tmp_path)
    graph.save(str(tmp_path / "text"))
    for written in ("text", "text/graph.npz", "text/graph.json"):
        assert len(Graph.load(str(tmp_path / written)).nodes) == len(graph.nodes)
    monkeypatch.setenv("HOME", str(tmp_path))
    graph.save("~/home")
    assert (tmp_path / "home" / "graph.npz").is_file() and len(Graph.load("~/home").nodes) == len(graph.nodes)
    assert (back.nodes == graph.nodes).all() and (back.weights == graph.weights).all() and back.tokens == graph.tokens
    (tmp_path / "graph.npz").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read .* Make it with `sae-italian graph`"):
        Graph.load(tmp_path)


def test_what_is_no_graph_is_refused(mistral):
    with pytest.raises(UsageError, match="fewer than two tokens"):
        attribute(mistral, [random_transcoder(0)], "c")
    with pytest.raises(UsageError, match="64 positions"):
        attribute(mistral, [random_transcoder(0)], "c" * 70)
    with pytest.raises(UsageError, match="two transcoders"):
        attribute(mistral, [random_transcoder(0), random_transcoder(0)], "ciao")
    for wrong, said in (
        ({"logits": [97]}, "token 97"),
        ({"logits": "casa"}, "token casa does not exist"),
        ({"logits": []}, "n_logits is 0"),
        ({"batch": -1}, "batch is -1; it must be 1 or more"),
        ({"max_nodes": -1}, "max_nodes is -1"),
    ):
        with pytest.raises(UsageError, match=said):
            attribute(mistral, [random_transcoder(0)], "ciao", **wrong)
    graph = attribute(mistral, [random_transcoder(0)], "ciao", logits=[5, 5])
    assert graph.of_kind("logit").sum() == 1
    assert attribute(mistral, [random_transcoder(0)], "ciao", logits=5).own == pytest.approx(graph.own)
    for shares in ((80,), (0.8, float("nan"))):  # percents pruned nothing
        with pytest.raises(UsageError, match="must be shares, 0 to 1"):
            prune(graph, *shares)
    with pytest.raises(UsageError, match="n_latents is -1"):
        check(mistral, [random_transcoder(0)], graph, n_latents=-1)
    with pytest.raises(UsageError, match="less itself"):
        attribute(mistral, [random_transcoder(0)], "ciao", logits=[5], against=5)
    mistral.original_model = None  # what a bridge has
    with pytest.raises(UsageError, match="TransformerLens' bridge; a graph needs the model itself"):
        attribute(mistral, [random_transcoder(0)], "ciao")
    del mistral.original_model
    with pytest.raises(UsageError, match="float32"):
        Linear(mistral.half(), mistral.tokenizer("ciao").input_ids, {})


def test_what_a_large_graph_will_take_is_said_before(mistral, monkeypatch, capsys):
    monkeypatch.setattr("sae_italian.circuits.edges.SAID_FROM", 1e-6)
    graph = attribute(mistral, [random_transcoder(0)], "ciao", max_nodes=20)
    assert f"{graph.n_active} latents are active, 20 become nodes" in capsys.readouterr().err


def test_a_token_that_nobody_looks_at_changes_nothing(mistral):
    """Causal: the logits' gradient at positions behind a target is zero, and a later token leaves earlier rows alone."""
    tokens = mistral.tokenizer("ciao bella").input_ids
    linear = Linear(mistral, tokens, {1: "blocks.1.mlp.hook_in"})
    gradients = linear.gradients([Targets(1, torch.tensor([4]), torch.ones(1, 32, dtype=torch.float64))])
    assert all((gradient[0, 5:] == 0).all() for gradient in gradients[:2]) and (gradients[0][0, 4] != 0).any()
    assert gradients[2:] == [None, None]  # later layers
    saes = [random_transcoder(layer) for layer in range(3)]
    one, other = (attribute(mistral, saes, text) for text in ("ciao bella", "ciao belli"))
    rows = [{named(graph.nodes[t]): row for row, t in enumerate(graph.targets.tolist())} for graph in (one, other)]
    early = [key for key in rows[0] if key[0] == "latent" and key[2] < 10]
    assert len(early) > 100 and {key for key in rows[1] if key[0] == "latent" and key[2] < 10} == set(early)
    for graph, row in zip((one, other), rows, strict=True):
        before = np.array([0 <= node.position < 10 for node in graph.nodes])
        assert (graph.weights[[row[key] for key in early]][:, ~before & ~graph.of_kind("constant")] == 0).all()
    seen = [
        graph.weights[[row[key] for key in early]][:, [0 <= node.position < 10 for node in graph.nodes]]
        for graph, row in zip((one, other), rows, strict=True)
    ]
    assert np.allclose(*seen, atol=1e-9)


def test_a_token_outside_the_attention_window_changes_nothing(mistral):
    """With a window of two tokens, three layers look back three: the tokens before those may be any."""
    mistral.config.sliding_window = 2
    saes = [random_transcoder(layer) for layer in range(3)]
    one, other = (attribute(mistral, saes, text, logits=[7, 9]) for text in ("abc bella", "xyz bella"))
    for graph in (one, other):
        far = np.array([0 < node.position <= 3 for node in graph.nodes])
        assert far.sum() > 20 and (graph.weights[-2:, far] == 0).all()
    columns = [[i for i, node in enumerate(graph.nodes) if graph.weights[-1, i]] for graph in (one, other)]
    names = [[named(graph.nodes[i]) for i in some] for graph, some in zip((one, other), columns, strict=True)]
    assert names[0][:-1] == names[1][:-1] and len(names[0]) > 100  # the last is the constant: what rounding leaves
    edges = [graph.weights[-2:, some[:-1]] for graph, some in zip((one, other), columns, strict=True)]
    assert np.allclose(*edges, atol=1e-9) and np.allclose(one.own[-2:], other.own[-2:], atol=1e-9)


def toy(mistral):
    """Make the model so plain that a person can write down its graph: uniform attention of one head, MLPs y = x W."""
    width = 0.2 * torch.randn(3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    saes = []
    for layer, block in enumerate(mistral.model.layers):
        block.self_attn.q_proj.weight.data.zero_()  # each position looks at all before it alike
        block.mlp = Identity(width[layer])
        sae = random_transcoder(layer, d_sae=64)
        eye = torch.eye(32, dtype=torch.float64)
        sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([width[layer], -width[layer]])
        sae.b_enc.data.zero_(), sae.b_dec.data.zero_()
        saes.append(sae)
    return saes


def test_the_edges_of_a_toy_are_those_by_hand(mistral):
    """All of the model again in numpy, its norms' scales held: every edge between latents, to 1e-6."""
    saes, prompt = toy(mistral), "ciao"
    graph = attribute(mistral, saes, prompt)
    p = {name: value.detach().numpy() for name, value in mistral.named_parameters()}
    n = len(graph.tokens)
    uniform = np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    x = p["model.embed_tokens.weight"][mistral.tokenizer(prompt).input_ids[0].numpy()]
    # from a position and dimension of the stream before block 1 to one after its attention, block by block
    maps, reads, scale = [], [], lambda x: 1 / np.sqrt((x**2).mean(-1) + mistral.config.rms_norm_eps)
    repeat = np.repeat(np.eye(16).reshape(2, 8, 16), 2, axis=0).reshape(32, 16)  # two key-value heads serve four heads
    for layer, sae in enumerate(saes):
        name = f"model.layers.{layer}"
        ov = p[f"{name}.self_attn.o_proj.weight"] @ repeat @ p[f"{name}.self_attn.v_proj.weight"]
        first = scale(x)[:, None] * p[f"{name}.input_layernorm.weight"]
        mixed = np.einsum("pq,de,qe->pdqe", uniform, ov, first) + np.einsum("pq,de->pdqe", np.eye(n), np.eye(32))
        x = np.einsum("pdqe,qe->pd", mixed, x)
        reads.append(scale(x)[:, None] * p[f"{name}.post_attention_layernorm.weight"])
        maps.append(mixed)
        x = x + (reads[-1] * x) @ sae.W_dec.detach().numpy()[:32]
    checked = 0
    for row, target in enumerate(graph.targets.tolist()):
        to = graph.nodes[target]
        if to.kind != "latent" or to.layer == 0:
            continue
        sign, dim = (1, to.index) if to.index < 32 else (-1, to.index - 32)
        gradient = np.zeros((n, 32))
        gradient[to.position, dim] = sign * reads[to.layer][to.position, dim]
        for layer in range(to.layer, -1, -1):
            gradient = np.einsum("pd,pdqe->qe", gradient, maps[layer])
            for column in [i for i, s in enumerate(graph.nodes) if s.kind == "latent" and s.layer == layer - 1]:
                source = graph.nodes[column]
                written = source.value * saes[layer - 1].W_dec[source.index].detach().numpy()
                hand = gradient[source.position] @ written
                assert graph.weights[row, column] == pytest.approx(hand, rel=1e-6, abs=1e-8)  # its norms are float32
                checked += 1
    assert checked > 1000 and np.abs(graph.weights[:, graph.of_kind("error")]).max() < 1e-12


def test_a_circuit_of_two_latents_is_found_whole(mistral):
    """What token 3 writes turns latent 5 of layer 0 on, that turns 7 of layer 2 on, and that one writes token 50's logit."""
    saes = [random_transcoder(layer) for layer in (0, 2)]
    head, gain = mistral.get_output_embeddings().weight.detach(), mistral.model.norm.weight.data
    gain.fill_(1.0)
    for block in mistral.model.layers:
        block.self_attn.o_proj.weight.data *= 0.01
        block.mlp = Identity(torch.zeros(32, 32, dtype=torch.float64))
        block.input_layernorm.weight.data.fill_(1.0), block.post_attention_layernorm.weight.data.fill_(1.0)
    prompt, ways = "cab", torch.linalg.qr(torch.randn(32, 3, dtype=torch.float64))[0].T
    token = mistral.tokenizer(prompt).input_ids[0, -1]
    mistral.model.embed_tokens.weight.data[token] = 3 * ways[0]
    for sae in saes:
        sae.W_enc.data.zero_(), sae.b_enc.data.fill_(-0.5), sae.b_dec.data.zero_(), sae.W_dec.data.zero_()
    saes[0].W_enc.data[:, 5], saes[0].W_dec.data[5] = ways[0], 2 * ways[1]
    saes[1].W_enc.data[:, 7], saes[1].W_dec.data[7] = ways[1], 40 * (head[50] - head.mean(0))
    for layer, sae in zip((0, 2), saes, strict=True):  # the MLPs write what the latents do
        mistral.model.layers[layer].mlp = sae
    graph = attribute(mistral, saes, prompt, logits=[50])
    keep, _ = prune(graph)
    kept = [place(node) for node in graph.nodes[keep] if node.kind == "latent"]
    assert kept == [(0, 3, 5), (2, 3, 7)]
    number = {named(node): i for i, node in enumerate(graph.nodes)}
    first, second = number["latent", 0, 3, 5], number["latent", 2, 3, 7]
    row_of = {target: row for row, target in enumerate(graph.targets.tolist())}
    for target, source in ((second, first), (graph.targets[-1], second), (first, number["embedding", -1, 3, -1])):
        row = np.abs(graph.weights[row_of[int(target)]])
        assert row.argmax() == source and row[source] > 0.8 * row.sum()
    assert scores(graph).replacement == pytest.approx(1)


def test_the_worked_example_of_circuit_tracer():
    """Its tests/test_graph.py: twelve nodes, influences 1/12, 1/3, 1/4, 1/6 of one logit."""
    edges = {11: (1, 3, 6, 8), 3: (0, 1, 6), 1: (9, 10), 0: (9,)}
    layers = {0: 1, 1: 1, 3: 2}
    latents = nodes_of("latent", [layers.get(i, 0) for i in range(11)], 0, range(11), 1.0)
    nodes = joined([latents, nodes_of("logit", 3, 0, 0, 1.0)])
    weights = np.zeros((12, 12))
    for target, sources in edges.items():
        weights[target, list(sources)] = 10
    graph = Graph("p", "m", ("t",), 1, nodes, np.arange(12), weights, weights.sum(1), 11)
    expected = [1 / 12, 1 / 3, 0, 1 / 4, 0, 0, 1 / 3, 0, 1 / 4, 1 / 4, 1 / 6, 0]
    assert influence(graph) == pytest.approx(expected, abs=1e-12)


def test_an_interrupted_graph_goes_on_where_it_was(mistral, tmp_path, monkeypatch):
    import sae_italian.circuits.edges as edges

    saes = [random_transcoder(layer) for layer in range(3)]
    whole = attribute(mistral, saes, "ciao bella", batch=4)
    rows, calls = _Rows(Prompt(mistral, saes, "ciao bella"), 4, None), []
    left, clean = np.ones((1, len(rows.nodes))), np.zeros((1, len(rows.nodes)))
    for out in (left, clean):
        rows(rows.nodes[(rows.nodes.kind == "latent") & (rows.nodes.layer == 1)][:1], out)
    assert np.array_equal(left, clean)  # of a row that was written and not booked nothing stays

    def dying(self, nodes, out, real=edges._Rows.__call__):
        calls.append(len(nodes))
        if len(calls) == 30:
            raise KeyboardInterrupt
        real(self, nodes, out)

    monkeypatch.setattr(edges._Rows, "__call__", dying)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        attribute(mistral, saes, "ciao bella", batch=4, resume="~")
    assert {file.name for file in tmp_path.iterdir()} == {"rows.partial", "visited.json"}
    calls[:] = [0] * 100
    again = attribute(mistral, saes, "ciao bella", batch=4, resume=tmp_path)
    assert (again.nodes == whole.nodes).all() and np.array_equal(again.weights, whole.weights)
    assert not list(tmp_path.iterdir()) and sum(calls) < len(whole.targets) - 50  # not all were done again
    for factor, asked in ((1.0, {"against": 9}), (2.0, {})):  # another question begins anew, and other transcoders
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            attribute(mistral, saes, "ciao bella", batch=4, resume=tmp_path)
        calls[:] = [0] * 100
        saes[2].W_dec.data *= factor
        other = attribute(mistral, saes, "ciao bella", batch=4, resume=tmp_path, **asked)
        assert np.array_equal(other.weights, attribute(mistral, saes, "ciao bella", batch=4, **asked).weights)
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        attribute(mistral, saes, "ciao bella", batch=4, resume=tmp_path)
    with (tmp_path / "rows.partial").open("r+b") as file:
        file.truncate(1000)  # what a full disk leaves
    calls[:] = [0] * 100
    assert np.array_equal(attribute(mistral, saes, "ciao bella", batch=7, resume=tmp_path).targets, whole.targets)
    assert sum(calls) == len(whole.targets)  # all of it anew


@pytest.mark.parametrize("most", [60, 4096])
def test_a_graph_stopped_by_its_minutes_still_adds_up_and_goes_on(most, mistral, tmp_path):
    saes = [random_transcoder(layer) for layer in range(3)]
    whole = attribute(mistral, saes, "ciao bella", batch=4, max_nodes=most)
    with time_bound(1e-6) as cut:
        some = attribute(mistral, saes, "ciao bella", batch=4, max_nodes=most, resume=tmp_path)
    assert cut == [f"edges: stopped by the time bound at 4 of {len(whole.latents)} latents"]
    assert len(some.latents) == 4 and some.n_active == whole.n_active
    assert np.allclose(some.weights.sum(axis=1), some.own)  # what was not visited is the rest of its layer
    logits = [sum(row) for row in (some.weights[4:], whole.weights[len(whole.latents) :])]
    assert np.isclose(logits[0].sum(), logits[1].sum())
    with time_bound(1e-6):
        _, random = random_graph(mistral, saes, whole, batch=4)  # a control is as large as what it stands beside
        assert len(random.latents) == min(len(whole.latents), random.n_active) > 4
        further = attribute(mistral, saes, "ciao bella", batch=4, max_nodes=most, resume=tmp_path)
    assert len(further.latents) == 8
    again = attribute(mistral, saes, "ciao bella", batch=4, max_nodes=most, resume=tmp_path)
    assert (again.nodes == whole.nodes).all() and np.allclose(again.weights, whole.weights, atol=1e-12)
    assert not list(tmp_path.iterdir())


def test_a_graph_whose_time_is_bounded_begins_with_what_matters(mistral, monkeypatch):
    """The 16 of its first look have more of the influence than the 16 that come first by layer and position."""
    from sae_italian.base.pace import Pace

    saes, steps = [random_transcoder(layer) for layer in range(3)], []
    whole = attribute(mistral, saes, "ciao bella")
    share = dict(zip([place(whole.nodes[i]) for i in whole.latents], influence(whole)[whole.latents], strict=True))
    monkeypatch.setattr(Pace, "step", lambda self, n=1: len(steps.append(n) or steps) == 4)
    with time_bound(1):
        found = attribute(mistral, saes, "ciao bella", batch=4)
    kept = [share[place(found.nodes[i])] for i in found.latents]
    assert len(kept) == 16 and sum(kept) > 1.3 * sum([*share.values()][:16])


def test_more_latents_than_the_memory_holds_are_told_and_a_bound_that_does(mistral):
    saes, active = [random_transcoder(layer) for layer in range(3)], r"(\d+) latents are active"
    with pytest.raises(UsageError, match=rf"{active}; a graph with \1 of them needs .*Use max_nodes=\d+") as refused:
        attribute(mistral, saes, "ciao bella", memory=1e-3)
    bound = int(str(refused.value).split("max_nodes=")[1].split(",")[0])
    few = attribute(mistral, saes, "ciao bella", memory=1e-3, max_nodes=bound)
    assert 20 < few.of_kind("latent").sum() == bound < few.n_active


def test_transcoders_of_another_model_are_named(mistral):
    with pytest.raises(UsageError, match="24"):
        attribute(mistral, [random_transcoder(0, d=24)], "ciao")
    with pytest.raises(UsageError, match="layer"):
        attribute(mistral, [random_transcoder(7)], "ciao")


def test_a_token_that_is_never_likely_has_a_graph_that_says_so(mistral):
    from sae_italian.circuits.show import summary

    saes = [random_transcoder(layer) for layer in range(3)]
    mistral.get_output_embeddings().weight.data[9] -= 1000 * mistral.model.norm.weight.data.sign()
    logits = mistral(mistral.tokenizer("ciao").input_ids).logits[0, -1]
    graph = attribute(mistral, saes, "ciao", logits=[int(logits.argmin())])
    assert graph.nodes[-1].value < 1e-6 and influence(graph).sum() > 0.5 and 0 < scores(graph).replacement < 1
    assert "does not expect" in summary(graph)
    assert "does not expect" not in summary(attribute(mistral, saes, "ciao"))
