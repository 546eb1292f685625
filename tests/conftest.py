"""Small models, SAEs and corpora that every test can use. Nothing here needs a network, a GPU or ../shared."""

from __future__ import annotations

import gc
import json
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# One thread here and in the processes that tests start: sums are then the same everywhere, and two test workers on two
# cores do not wait for each other's threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
# The files that take longest start first, so that at the end no core waits for one of them (make test: a file a process).
LONGEST = (
    "test_quickstart",
    "browser/test_chromium",
    "test_notebooks",
    "training/test_run",
    "training/test_processes",
    "papers/test_reproduce",
    "training/test_shard_runs",
    "autointerp/llm/test_run",
    "cache/test_build_ray",
    "benchmark/test_run",
    "autointerp/llm/test_conformance",
    "browser/server/test_chromium_server",
    "test_pages",
    "analysis/causal/test_notebook",
    "models/test_parity",
    "training/test_logging",
    "training/test_publish",
    "benchmark/test_choose_k",
    "autointerp/test_notebook",
    "autointerp/llm/test_random_control",
    "autointerp/test_planted_truth",
    "autointerp/test_run",
    "base/test_units_ray",
    "models/test_plugin",
    "saes/test_random_twin",
    "training/test_curves",
    "training/test_shards",
    "training/test_suite",
)

SENTENCES = (
    "La città è più bella perché c'è il sole e l'aria è tiepida.",
    "Gli amici dell'università hanno già visto «Il Gattopardo» ieri sera.",
    "Quando Marta e Luca sono andati al mercato, Marta ha dato un libro a Luca.",
    "Un'altra volta verrò lunedì, anche se può darsi che piova.",
    "Il consiglio comunale ha approvato il bilancio con 21 voti favorevoli.",
)


@pytest.fixture(scope="session")
def mini():
    """The embedded mini model with its tokenizer."""
    from sae_italian.models import load_model

    return load_model("sae-italian-mini")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs real Italian data in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory) -> Path:
    """A corpus of 400 different documents."""
    path = tmp_path_factory.mktemp("corpus") / "notizie.jsonl"
    with path.open("w", encoding="utf-8") as handle:
        for number in range(400):
            text = f"Documento numero {number}. " + " ".join(SENTENCES[(number + i) % len(SENTENCES)] for i in range(4))
            handle.write(json.dumps({"text": text, "source": "prova"}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="session")
def identity_sae(mini):
    """An SAE that reconstructs exactly: x = ReLU(x) - ReLU(-x)."""
    from sae_lens import StandardSAE, StandardSAEConfig

    d_in = mini.config.hidden_size
    config = StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, apply_b_dec_to_input=False)
    sae = StandardSAE(config)
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye], dim=0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return described(sae)


@pytest.fixture(scope="session")
def topk_sae(mini):
    """A TopK SAE with random weights, k 8."""
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=mini.config.hidden_size, d_sae=300, k=8))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.copy_(sae.W_enc.T)
    return described(sae)


def described(sae, hook_name: str = "blocks.2.hook_resid_post"):
    """Give an SAE the metadata that our tools read."""
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.context_size = "sae-italian-mini", hook_name, 128
    metadata.dataset_path = "micro-italiano"
    return sae.eval()


@pytest.fixture(scope="session")
def small_spec():
    """A training run of seconds on the mini model."""
    from sae_italian.training import load_spec

    return load_spec(
        "mini/topk.yaml",
        "training_tokens=20480",
        "sae.d_sae=256",
        "train_batch_size_tokens=512",
        "buffer_tokens=4096",
        "store_batch_size_prompts=8",
        "lr_warm_up_steps=5",
        "lr_decay_steps=10",
        "dead_feature_window=10",
        "checkpoint_every_tokens=5120",
    )


@pytest.fixture(scope="session")
def trained_sae(small_spec, tmp_path_factory) -> Path:
    from sae_italian.training import train

    return train(small_spec, tmp_path_factory.mktemp("trained") / "sae")


@pytest.fixture(scope="session")
def cached_activations(tmp_path_factory) -> Path:
    """20,480 tokens of the mini model at layer 1, kept by SAELens' own runner as docs/activation-cache.md says."""
    folder = tmp_path_factory.mktemp("cached")
    page = (Path(__file__).parents[1] / "docs" / "activation-cache.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    for written, here in (("1M", "20480"), ('"activations"', repr(str(folder / "activations"))), ("0.1", "0.0105")):
        assert written in code
        code = code.replace(written, here)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        exec(code, {})
    return folder / "activations"


@pytest.fixture(scope="session")
def small_cache(mini, trained_sae, tmp_path_factory) -> Path:
    """A cache of 40 k tokens of MicroItaliano, three shards and more."""
    from sae_italian.cache import build_cache
    from sae_italian.saes import load_sae

    out = tmp_path_factory.mktemp("caches") / "cache"
    return build_cache(
        load_sae(trained_sae),
        mini,
        "micro-italiano",
        out,
        n_tokens=40_000,
        windows_per_shard=100,
        sae_name=str(trained_sae),
    )


@pytest.fixture(scope="session")
def silent_latent(mini, topk_sae, tmp_path_factory) -> tuple[Path, object, int]:
    """A cache of 3 k tokens, its SAE, and a latent of it that by construction never fires."""
    import copy

    from sae_italian.cache import build_cache

    sae, latent = copy.deepcopy(topk_sae), 7
    with torch.no_grad():
        sae.W_enc[:, latent], sae.b_enc[latent] = 0.0, -1e4
    out = tmp_path_factory.mktemp("silent") / "cache"
    return build_cache(sae, mini, "micro-italiano", out, n_tokens=3_000, sae_name="silent"), sae, latent


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster of two workers on this machine, one for all tests that need it: starting it takes seconds."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'sae-italian[ray]'")
    from sae_italian.base.units import connect

    connect(None, 2)
    yield ray
    ray.shutdown()


def pytest_configure(config) -> None:
    # `nohup make test &` ignores both, and what is tested would too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.option.loadscopereorder = (
        False  # pytest-xdist would start files of many tests first, however short these are
    )
    gc.disable()


def pytest_collection_finish(session) -> None:
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_search() -> None:
    """Half a million objects of the libraries stay; searching them for garbage takes half a second each time."""
    if not gc.get_freeze_count():
        gc.freeze()


def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what needs the hub, unless it is asked for by its mark; put the longest files first."""
    place = {str(Path(__file__).parent / f"{name}.py"): n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))
    if "hub" not in config.getoption("markexpr"):
        hub = [item for item in items if item.get_closest_marker("hub")]
        items[:] = [item for item in items if item not in hub]
        config.hook.pytest_deselected(items=hub)


def pytest_terminal_summary(terminalreporter) -> None:
    """End `make test-hub` with one table of what passed and failed, and the figures that were found."""
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            if "hub" not in getattr(report, "keywords", ()):
                continue
            found = ", ".join(f"{name} {value}" for name, value in report.user_properties)
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (
                "" if outcome == "passed" else (crash.message if crash else report.longreprtext).strip().splitlines()[0]
            )
            rows.append(f"| {report.nodeid.partition('::')[2]} | {outcome} | {' '.join((found, why)).strip():.300} |")
    if rows:
        terminalreporter.write_line("\n".join(["", "| test | result | found |", "|---|---|---|", *rows]))
