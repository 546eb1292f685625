"""The GPU path as far as a CPU can prove it: a lint, every room's work on a pretended GPU, the branches that only CUDA takes.

`tests/devices.py` pretends; no line of this has run on a real one.
"""

import ast
import json
import re
import shutil
from collections import Counter
from functools import cache, partial

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput

from sae_italian.analysis.latent import ablate, steer
from sae_italian.analysis.patching import Patcher, patch_inputs
from sae_italian.base.errors import UsageError
from sae_italian.cache import build_cache
from sae_italian.cli import main
from sae_italian.evaluation import evaluate
from sae_italian.evaluation.doctor import examine
from sae_italian.models import load_model
from sae_italian.models import loading as models_loading
from sae_italian.models.loading import device_of
from sae_italian.saes import load_sae, model_of, sparse
from sae_italian.saes import loading as saes_loading
from sae_italian.saes.sparse import latent_sums, row_dots
from sae_italian.training.config import spec_from_dict
from sae_italian.training.loop import SAERun
from sae_italian.training.pretrained import LATENT_MAP
from sae_italian.training.run import SAE_FOLDER, open_stream, train_together
from tests import fresh, house
from tests.circuits.test_graph import random_transcoder
from tests.devices import Mixed, Pretended, place

# --- the lint ---------------------------------------------------------------------------------------------------------

MAKES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "linspace",
    "tensor",
}
WAITS = {"cpu", "item", "numpy", "tolist"}
# By file: tensors made without a device, calls that wait for one, and why that many are right.
ALLOWED = {
    "training/stream.py": (
        4,
        1,
        "the buffer's slots are numbers of the CPU, so that a resumed run has the same; one wait in a refusal",
    ),
    "training/loop.py": (0, 0, "nothing is read off a step but every LOG_EVERY_STEPS, by SAELens' log"),
    "training/processes.py": (2, 4, "flags and sums that go by gloo are the CPU's; hashes at a checkpoint"),
    "training/pretrained.py": (0, 8, "once at the start and once at the end of a run"),
    "training/shards.py": (
        0,
        2,
        "a checkpoint's tensors; a step's one wait, the number of the dead, is no call of these",
    ),
    "saes/sparse.py": (0, 4, "top_positive alone waits, whose values go to the feature cache"),
    "saes/architectures.py": (0, 1, "the estimate of the scale, once a run"),
    "saes/fit.py": (1, 12, "measures and thresholds: a number a chunk, no step of training"),
    "saes/jumprelu.py": (1, 7, "an export: sums and sorts on the CPU, no step of training"),
    "cache/shards.py": (0, 8, "what is written to disk: counts, latents and values of a chunk"),
    "cache/build.py": (0, 2, "NumPy's bookkeeping of ranges; the shards do the rest"),
    "evaluation/evaluate.py": (2, 11, "sums by document are the CPU's; one wait a pass for each column"),
    "benchmark/probes.py": (1, 6, "tokens of a batch; one wait a sentence, for what scikit-learn fits on the CPU"),
    "analysis/detect.py": (0, 5, "numbers of NumPy and of the feature cache"),
    "analysis/latent.py": (2, 12, "what is shown of one prompt; numbers of rows, which index on any device"),
    "analysis/patching.py": (14, 14, "the elimination's bookkeeping is the CPU's; a wait a batch of rows"),
    "models/activations.py": (3, 3, "texts of a handful of tokens"),
}


@cache
def found_in(file: str) -> Counter[str]:
    tree = ast.parse(house.text(house.PACKAGE / file))
    moved = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "to"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    found: Counter[str] = Counter()
    for call in calls:
        name, of = call.func.attr, call.func.value  # pyright: ignore[reportAttributeAccessIssue]
        without = not any(word.arg in ("device", None) for word in call.keywords) and id(call) not in moved
        found["made"] += isinstance(of, ast.Name) and of.id == "torch" and name in MAKES and without
        found["waits"] += name in WAITS and not call.args
    return found


@pytest.mark.parametrize("file", ALLOWED)
def test_tensors_are_made_with_a_device_and_waits_are_counted(file):
    made, waits, why = ALLOWED[file]
    assert (found_in(file)["made"], found_in(file)["waits"]) == (made, waits), why


# --- on a pretended GPU -----------------------------------------------------------------------------------------------


def test_the_pretended_gpu_refuses_what_cuda_refuses():
    with Pretended() as gpu:
        a, b = torch.zeros(3, 4, device="cuda"), torch.ones(4)
        assert (a.device.type, b.device.type, (a + b.to(a.device)).device.type) == ("cuda", "cpu", "cuda")
        for wrong in (
            lambda: a + b,
            lambda: a.index_select(0, torch.tensor([0])),
            lambda: b[torch.zeros(1, device="cuda").long()],
        ):
            with pytest.raises(Mixed, match="cuda"):
                wrong()
        with pytest.raises(Mixed, match="numpy"):
            a.numpy()
        with pytest.raises(Mixed, match="generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        assert (a[torch.tensor([0])] + 1).device.type == "cuda"  # an index of the CPU is allowed
        before = gpu.syncs.total()
        assert a.sum().item() == 0 and a.cpu().numpy().shape == (3, 4) and bool((a == 0).all())
        assert gpu.syncs.total() == before + 3
        layer = torch.nn.Linear(4, 2).to("cuda")
        layer(a).sum().backward()
        assert layer.weight.device.type == "cuda" and place(layer(a)) == "cuda"
        assert a.double().device.type == "cuda"
        gpu.pid = 0  # as in a child of this process
        assert (b + 1).device.type == "cpu"
        with pytest.raises(Mixed, match="forked"):
            a + 1
    with Pretended(wide=False), pytest.raises(Mixed, match="float64"):
        torch.zeros(3, device="cuda").double()


@pytest.fixture
def anywhere(monkeypatch):
    """Let doors take cuda: that it is not here is another test's."""
    for door in ("sae_italian.models.loading", "sae_italian.saes.loading"):
        monkeypatch.setattr(f"{door}.device_of", lambda name: "cpu" if name == "auto" else name)


CASES = {
    "sparse_topk": {"architecture": "sparse_topk", "k": 8},
    "annealed": {"architecture": "sparse_topk", "k": 8, "k_anneal_steps": 4},
    "topk": {"architecture": "started_topk", "k": 8, "start": "mean"},
    "batchtopk": {"architecture": "batchtopk", "k": 8},
    "jumprelu": {"architecture": "jumprelu"},
    "tied": {"architecture": "tied"},
    "topk_transcoder": {"architecture": "topk_transcoder", "k": 8, "d_out": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu_takes_its_own_branches_and_gives_the_same(case):
    """Gradients with dead latents, by embedding bags instead of sparse products."""
    values = {"d_in": 32, "d_sae": 2048, "dtype": "float32", **CASES[case]}
    x = torch.randn(64, 32 + values.get("d_out", 0), generator=torch.Generator().manual_seed(0))
    dead = torch.arange(2048) % 3 == 0

    def gradients(device):
        torch.manual_seed(0)
        sae = TrainingSAE.from_dict(values | {"device": "cpu"})
        sae.to(device)
        given = TrainStepInput(
            x.to(device), {"l1": 1.0, "l0": 1.0}, dead.to(device), n_training_steps=1, is_logging_step=False
        )
        sae.training_forward_pass(given).loss.backward()
        return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}

    ours = gradients("cpu")
    with Pretended() as gpu:
        theirs = {name: grad.clone() for name, grad in gradients("cuda").items()}
    assert ours.keys() == theirs.keys() and len(ours) >= 2
    for name, grad in ours.items():
        assert torch.allclose(grad, theirs[name], atol=1e-5, rtol=1e-4), name
    waited = {where: n for where, n in gpu.syncs.items() if where.startswith(("sparse.py", "architectures.py"))}
    assert sum(waited.values()) <= 1, waited  # how many latents are dead


@pytest.fixture
def gpu_spec(small_spec):
    values = small_spec.model_dump() | {"device": "cuda", "training_tokens": 5120, "evaluate_every_tokens": 0}
    values |= {"sae": small_spec.sae | {"architecture": "sparse_topk", "start": "mean"}, "train_batch_size_tokens": 256}
    return spec_from_dict(values)


def test_a_step_of_the_loop_waits_for_the_gpu_once_at_most(gpu_spec, anywhere, tmp_path):
    """Stream, scale, forward, backward, clip, Adam and counters; a refill of the buffer checks once that it is finite."""
    with Pretended() as gpu:
        model = load_model("sae-italian-mini").to("cuda")
        stream = open_stream(gpu_spec, model, [gpu_spec.hook_name])
        run = SAERun(gpu_spec, model, tmp_path)
        run.prepare(stream)
        for _ in range(3):
            run.step(next(stream))
        gpu.syncs.clear()
        for _ in range(4):  # 1,024 tokens, one read of the model
            run.step(next(stream))
        assert dict(gpu.syncs) == WAITS_OF_FOUR_STEPS
        assert all(place(p) == "cuda" for p in run.sae.parameters())


WAITS_OF_FOUR_STEPS = {
    "architectures.py:_auxiliary_loss: nonzero": 4,  # how many latents are dead
    "sae_trainer.py:_train_step: to": 4,  # of the pretence: PyTorch's clip asks where the gradients really are
    "activations.py:read_many: __bool__": 1,  # one read of the model: transformers looks at its mask,
    "stream.py:<listcomp>: index by a mask": 1,  # ... which tokens are kept,
    "stream.py:_rows: __bool__": 1,  # ... and whether the activations are finite
}


def test_a_whole_training_on_a_gpu_ends_with_the_same_sae(gpu_spec, trained_sae, anywhere, tmp_path):
    """From a published SAE, with its checkpoints and its map; the weights are those of the CPU."""
    spec = spec_from_dict(gpu_spec.model_dump() | {"from_pretrained_path": str(trained_sae)})
    weights = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        out.mkdir()
        with Pretended(wide=False), pytest.MonkeyPatch.context() as patch:
            patch.setattr(saes_loading, "_from_folder", _moved(saes_loading._from_folder))
            model = load_model("sae-italian-mini").to(device)
            each = spec.model_copy(update={"device": device})
            train_together({SAE_FOLDER: each}, {SAE_FOLDER: out}, model, out)
        weights[device] = load_sae(out).state_dict()
        assert (out / LATENT_MAP).is_file()
    for name, tensor in weights["cpu"].items():
        assert torch.allclose(tensor, weights["cuda"][name], atol=1e-4), name


def _moved(load):
    """Read an SAE on the CPU, then move it: safetensors reads onto a real GPU by itself."""
    return lambda folder, device: load(folder, "cpu").to(device)


def test_card_cache_and_causal_tools_on_a_gpu(trained_sae, tmp_path):
    here, there = {}, {}
    for found, device in ((here, "cpu"), (there, "cuda")):
        with Pretended(wide=False):
            model, sae = load_model("sae-italian-mini").to(device), load_sae(trained_sae).to(device)
            found["card"] = evaluate(sae, model, "micro-italiano", n_tokens=600, context_size=64)
            folder = build_cache(sae, model, "micro-italiano", tmp_path / device, n_tokens=600, windows_per_shard=8)
            found["cache"] = {file.name: file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
            prompt = "La casa"
            latent = int(codes_of(model, sae, prompt)[-1].argmax())
            found["ablated"] = ablate(model, model.tokenizer, sae, prompt, latent, top=2)
            found["steered"] = steer(model, model.tokenizer, sae, prompt, latent, [1.0], n_new_tokens=2)
            patcher = Patcher(model, sae, patch_inputs(model.tokenizer, model, [("La casa", "La cosa")]))
            found["effects"], found["slopes"] = patcher.effects(), patcher.attribution()
    assert here["cache"].keys() == there["cache"].keys() and len(here["cache"]) > 1
    assert here["card"].explained_variance.value == pytest.approx(there["card"].explained_variance.value, abs=1e-5)
    assert here["card"].ce_loss_with_sae.value == pytest.approx(there["card"].ce_loss_with_sae.value, abs=1e-5)
    moved = [[move.id for p in found["ablated"].positions for move in p.raised] for found in (here, there)]
    assert moved[0] == moved[1] and here["steered"].steered[0].text == there["steered"].steered[0].text
    for key in ("effects", "slopes"):
        assert torch.allclose(here[key], there[key], atol=1e-5)


@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")])
def test_model_and_sae_may_be_in_different_places(trained_sae, places):
    with Pretended(wide=False):
        model, sae = load_model("sae-italian-mini").to(places[0]), load_sae(trained_sae).to(places[1])
        assert evaluate(sae, model, "micro-italiano", n_tokens=600, context_size=64).explained_variance.value > 0
        assert examine(sae, model, "micro-italiano").check("norm scale").found


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_on_a_gpu_a_model_takes_the_room_that_it_took_in_training(monkeypatch, small_spec, tmp_path, device, dtype):
    """In bfloat16, as a 7B model fits into 24 GB; the processor computes in float32, which it does faster."""
    spec = small_spec.model_copy(update={"dtype": "bfloat16"})
    sae = SAERun(spec, load_model(spec.model, dtype=spec.dtype), tmp_path).sae
    monkeypatch.setattr(saes_loading, "device_of", lambda _: device)
    assert model_of(sae).dtype == dtype
    sae.cfg.metadata.model_from_pretrained_kwargs = None  # of others, who say nothing
    assert model_of(sae).dtype == torch.float32


COMMANDS = {
    "card": "evaluate SAE --tokens 600",
    "doctor": "saes doctor SAE",
    "patching": "ioi sae-italian-mini --sae SAE --n-pairs 2 --thresholds 2 --check 4 --anyway",
    "geometry": "geometry SAE --out OUT/g --sample 100",
    "graph": "graph sae-italian-mini TRANSCODERS LaCasa --out OUT/g check=2",
    "probes": "benchmark SAE --out OUT/b tasks=P2-number,P2-gender seeds=1",
    "explanations": "autointerp OUT/cache --n-latents 40 --workers 2",
    "subject": "autointerp OUT/cache --subject n_scored=1",
}


@pytest.fixture(scope="module")
def transcoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transcoders")
    for layer in range(4):
        sae = random_transcoder(layer, d=128, d_sae=150, dtype="float32")
        sae.cfg.metadata.model_name = "sae-italian-mini"
        sae.save_model(folder / f"L{layer}TC-1x")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_gpu_tells_what_it_tells_on_the_cpu(
    name, trained_sae, transcoders, small_cache, tmp_path, capsys
):
    """Model and SAE are put there by what `auto` is; nobody has to say so."""
    told = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        if "cache" in COMMANDS[name]:
            shutil.copytree(small_cache, out / "cache")
            if name == "subject":
                assert main(["autointerp", str(out / "cache"), "--n-latents", "3", "--no-random-control"]) == 0
        known = {"SAE": trained_sae, "TRANSCODERS": transcoders, "LaCasa": "La casa è"}
        words = [str(known.get(word, word.replace("OUT", str(out)))) for word in COMMANDS[name].split()]
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch, Pretended(wide=False) as gpu:
            for door in (models_loading, saes_loading):
                patch.setattr(door, "device_of", lambda name, here=device: here if name == "auto" else name)
            patch.setattr(saes_loading, "_from_folder", _moved(saes_loading._from_folder))
            assert main([*words, "--json"]) == 0, capsys.readouterr().err
        told[device] = json.loads(capsys.readouterr().out)
    assert gpu.syncs.total()  # it was there
    assert rounded(told["cpu"]) == rounded(told["cuda"])


def rounded(told):
    """Return what a command told, its numbers to three digits, without its folders and its time."""
    if isinstance(told, dict):
        return {key: rounded(value) for key, value in told.items() if key not in ("created", "out", "seconds")}
    if isinstance(told, list):
        return [rounded(each) for each in told]
    if isinstance(told, str):
        return re.sub("/(cpu|cuda)/", "/", told)
    return pytest.approx(told, abs=1e-3, rel=1e-3) if isinstance(told, float) else told


def codes_of(model, sae, prompt):
    from sae_italian.analysis.latent import codes
    from sae_italian.models.activations import read_many

    tokens = torch.tensor([model.tokenizer(prompt).input_ids]).to(model.device)
    return codes(sae, read_many(model, tokens, [sae.cfg.metadata.hook_name])[sae.cfg.metadata.hook_name][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedding_bags_and_sparse_products_agree(dtype, monkeypatch):
    """What a GPU takes and what a CPU takes, on the CPU."""
    torch.manual_seed(0)
    indices = torch.stack([torch.randperm(2048)[:8] for _ in range(100)])
    rows, other, weights = (torch.randn(*shape, dtype=dtype) for shape in ((2048, 32), (100, 32), (100, 8)))
    near = partial(torch.allclose, atol=1e-5 if dtype is torch.float32 else 1e-12, rtol=0.0)
    dots, sums = [], []
    for csr in (True, False):
        monkeypatch.setattr(sparse, "has_csr", lambda _, csr=csr: csr)
        dots.append(row_dots(indices, rows, other))
        sums.append(latent_sums(weights, indices, other, 2048))
    assert near(dots[0], (rows[indices] @ other[..., None])[..., 0]) and near(dots[0], dots[1])
    dense = torch.zeros(100, 2048, dtype=dtype).scatter_add_(1, indices, weights)
    assert near(sums[0], dense.T @ other) and near(sums[0], sums[1])


FAKE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from sae_italian.saes.sparse import decode, row_dots, weighted_rows
with FakeTensorMode(), torch.no_grad():
    rows, other = torch.empty(1024, 64, device="cuda"), torch.empty(32, 64, device="cuda")
    values, indices = torch.empty(32, 4, device="cuda"), torch.empty(32, 4, dtype=torch.long, device=INDEX)
    found = [weighted_rows(values, indices, rows), row_dots(indices, rows, other), decode(values, indices, rows)]
print([(tuple(each.shape), each.device.type) for each in found])
"""


@pytest.mark.parametrize("index", ["cuda", "cpu"])
def test_products_under_pytorchs_own_fake_cuda(index):
    """In a process of its own: what goes wrong there aborts it. Indices left on the CPU are the control."""
    done = fresh.run(["-c", FAKE.replace("INDEX", repr(index))])
    if index == "cuda":
        assert done.stdout.strip() == str([((32, 64), "cuda"), ((32, 4), "cuda"), ((32, 64), "cuda")]), done.stderr
    else:
        assert done.returncode and "cpu" in done.stderr.splitlines()[-1], done.stderr


# --- the name of a device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "found"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_or_the_cpu(monkeypatch, small_spec, cuda, found):
    """Not mps, where nothing of ours has ever run: who wants it names it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of("auto") == found
    assert spec_from_dict(small_spec.model_dump() | {"device": "auto"}).device == found


def test_a_pytorch_without_cuda_says_how_to_get_one_with_it(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        UsageError, match=r"built without CUDA.*pip install .*torch --index-url https://download.pytorch.org"
    ):
        device_of("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="not on this machine"):
        device_of("cuda")
