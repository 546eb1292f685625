"""The package on a real pretrained model, Gemma 3 270M (`make real`): what random weights and toys cannot show."""

import pytest
import torch

from sae_italian.models import load_model
from sae_italian.models.catalogue import folder_of

NAME = "google/gemma-3-270m"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not folder_of(NAME).is_dir(), reason=f"needs {NAME}: `make real`"),
]
ITALIAN = (
    "Il comune di Pisa ha approvato ieri il bilancio per il prossimo anno, dopo una discussione durata tutta la notte.",
    "La ragazza che abbiamo incontrato alla stazione studia medicina a Bologna e torna a casa ogni fine settimana.",
    "Quando piove, i bambini restano in classe e leggono i libri che la maestra ha portato dalla biblioteca.",
)
AGREEMENT = (
    ("I ragazzi", " corrono", " corre"),
    ("La ragazza", " corre", " corrono"),
    ("Le case", " sono", " è"),
    ("Il libro", " è", " sono"),
)


@pytest.fixture(scope="module")
def gemma():
    return load_model("gemma-3-270m")


def test_it_is_what_was_promised(gemma):
    facts = gemma.loaded_from
    assert facts["name"] == NAME and facts["quantisation"] == "MOSTLY_Q4_K_M" and facts["differences"] == []
    assert sum(weight.numel() for weight in gemma.parameters()) == 268_098_176


def test_it_knows_italian(gemma):
    """Agreement, and a loss far below what a model that guesses has (ln 262,144 is 12.5 nats)."""
    with torch.no_grad():
        for subject, right, wrong in AGREEMENT:
            logits = gemma(gemma.tokenizer(subject, return_tensors="pt").input_ids).logits[0, -1]
            first = [gemma.tokenizer(verb, add_special_tokens=False).input_ids[0] for verb in (right, wrong)]
            assert logits[first[0]] > logits[first[1]], subject
        losses = []
        for text in ITALIAN:
            tokens = gemma.tokenizer(text, return_tensors="pt").input_ids
            losses.append(float(gemma(tokens, labels=tokens).loss))
    assert sum(losses) / len(losses) < 4.5


def test_text_comes_back_whatever_is_in_it(gemma):
    for text in ("perché l'età è così?", "«Ciao» 😀 你好", "e\u0301 <s> <bos>"):
        ids = gemma.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert gemma.tokenizer.decode(ids) == text


def test_the_beginning_of_a_text_is_an_outlier(gemma):
    """BOS has many times the norm of other tokens (83,046 against 5,187 at layer 8), so it must not set the scale."""
    from sae_italian.models.activations import read_activations

    tokens = gemma.tokenizer(ITALIAN[0], return_tensors="pt").input_ids
    norms = read_activations(gemma, tokens, "blocks.8.hook_resid_post")[0].float().norm(dim=-1)
    assert norms[0] > 10 * norms[1:].median()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_bridge_reads_the_same(gemma):
    from sae_italian.models.loading import TOLERANCE, largest_differences

    tokens = gemma.tokenizer(ITALIAN[1], return_tensors="pt").input_ids
    for what, difference in largest_differences(gemma, load_model("gemma-3-270m", "bridge"), tokens).items():
        assert difference < TOLERANCE, (what, difference)


def test_the_final_gain_is_that_of_the_family(gemma):
    """Gemma multiplies by 1 + w: the last residual, normalised and multiplied by our gain, gives the model's own logits."""
    from sae_italian.models.activations import logit_lens, read_activations

    tokens = gemma.tokenizer(ITALIAN[2], return_tensors="pt").input_ids
    last = read_activations(gemma, tokens, "blocks.17.hook_resid_post")[0]
    normed = last / (last.pow(2).mean(-1, keepdim=True) + gemma.config.rms_norm_eps).sqrt()
    with torch.no_grad():
        expected = gemma(tokens).logits[0]
        found = logit_lens(gemma)(normed)
    cap = gemma.config.final_logit_softcapping
    found = found if cap is None else cap * torch.tanh(found / cap)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_dry_run_names_what_stands_out(gemma, jsonl, capsys):
    """BOS has 16 times the norm of a token, the mean nearly all of it, one dimension a thousand times the variance."""
    import json

    from sae_italian.cli import main

    words = [
        f"corpus={jsonl}",
        "training_tokens=20_480",
        "buffer_tokens=4_096",
        "repeat_corpus=true",
        "--dry-run",
        "--json",
    ]
    assert main(["train", "gemma-3-270m", *words]) == 0
    found = json.loads(capsys.readouterr().out)["activations"]["blocks.8.hook_resid_post"]
    assert 70_000 < found["bos_norm"] < 95_000 and 4_500 < found["median_norm"] < 6_000
    assert 0.9 < found["mean_norm"] / found["median_norm"] < 1.1
    assert found["tokens"][0]["name"] == "<bos>" and found["tokens"][0]["times"] > 10
    assert found["dimensions"][0]["times"] > 500


def test_loading_takes_no_memory_of_its_own_beyond_the_weights():
    """Private memory is at most 1.2 times the weights' bytes, with the tokenizer and through the bridge too.

    Resident are besides 0.5 of the file's pages, which the system takes back when it needs them.
    """
    from tests.bench.real_model import WEIGHTS, _peak_of

    for way in (WEIGHTS, "hf", "bridge"):
        found = _peak_of(NAME, way)
        assert 0.9 < found["private"] < 1.2 and found["resident"] < found["private"] + 0.55, way
