"""Each paper's whole evaluation on the embedded model with tiny budgets; resuming, skipping, bad input, the report."""

import pytest

from sae_italian.papers import reproduce

TINY = {
    "clic-it-2025": (
        "train_tokens=20480",
        "expansion=2",
        "card_tokens=2000",
        "cache_tokens=15000",
        "latents=12",
        "examples=6",
    ),
    "cunningham-2023": (
        "layers=[1]",
        "train_tokens=20480",
        "sweep_tokens=8192",
        "l1=[4.0]",
        "ratios=[0.5]",
        "kinds=[pca, random]",
        "fit_tokens=4000",
        "card_tokens=2000",
        "cache_tokens=12000",
        "latents=8",
    ),
    "llama-scope": (
        "sites=[R, TC]",
        "expansions=[2, 4]",
        "train_tokens=10240",
        "compare_tokens=8192",
        "card_tokens=2000",
        "loss_tokens=1000",
        "cache_tokens=12000",
        "latents=8",
    ),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Run each paper once."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp("papers") / name
            made[name] = out, reproduce(name, out, *TINY[name])
        return made[name]

    return run


@pytest.mark.parametrize("name", list(TINY))
def test_whole(done, name):
    out, report = done(name)

    assert (out / "report.html").is_file()
