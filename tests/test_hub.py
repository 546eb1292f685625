"""What stand-ins replace elsewhere, for real, where the Hugging Face hub is reachable: `make test-hub`.

It ends with a table of what passed and failed, with the figures that were found, to be sent back. Some gigabytes are
fetched, once; a gated model needs HF_TOKEN. Where there is no hub, `make test-hub` says "no hub" and runs 0 tests.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.hub

ITALIAN = "La città di Pisa, perché è sull'Arno, è più umida di quel che si crede: 21 gradi, «afa» e zanzare."
CLIC_IT = "alessandrobondielli/sae-Minerva-1B-32x:layers.14"
TRANSCODER = "llama_scope_lxtc_8x:l8tc_8x"
GEMMA_SCOPE = "gemma-scope-2-270m-pt-res-all:layer_8_width_16k_l0_big"
CORPORA = ("wikipedia-it", "fineweb-2-it", "clean-mc4-it-tiny", "italian-pd", "ud-italian")
SEED_TOKENS = 250_000  # of our own SAE, which stands beside Gemma Scope's


def reachable() -> bool:
    """Return whether the hub answers within some seconds."""
    import httpx
    from huggingface_hub.constants import ENDPOINT

    try:
        return httpx.head(ENDPOINT, timeout=5, follow_redirects=True).status_code < 500
    except httpx.HTTPError:
        return False


def tokenizers() -> list[str]:
    """Return the models of the catalogue that come from the hub."""
    from sae_italian.models import catalogue

    return [entry.aliases[0] for entry in catalogue().values() if not entry.package and not entry.wheels]


def note(record: Any, **figures: float | str) -> None:
    """Keep figures for the table that ends the run."""
    for name, value in figures.items():
        record(name, f"{value:.4g}" if isinstance(value, float) else str(value))


def test_minerva_350m_is_the_same_in_every_backend(record_property):
    from sae_italian.models.loading import compare_backends

    found = compare_backends("minerva-350m", ITALIAN)
    note(record_property, **found["differences"])
    assert found["ok"] and found["catalogue_differences"] == []


@pytest.mark.parametrize("name", tokenizers())
def test_a_tokenizer_gives_the_text_back(name, record_property):
    from sae_italian.models import load_tokenizer, resolve
    from sae_italian.models.loading import bos_count

    tokenizer: Any = load_tokenizer(name)
    ids = tokenizer(ITALIAN, add_special_tokens=False).input_ids
    note(record_property, tokens=len(ids), vocabulary=len(tokenizer), bos=bos_count(tokenizer))
    assert tokenizer.decode(ids).strip() == ITALIAN
    typed = tokenizer("<s> ciao", add_special_tokens=False).input_ids
    assert tokenizer.bos_token_id not in typed, "text is text"
    entry = resolve(name).entry
    assert entry is not None
    if entry.bos is not None:
        assert bool(bos_count(tokenizer)) == entry.bos


def test_the_released_sae_of_clic_it(record_property):
    """Its k, whether it fits its model, and how well it does on Italian Wikipedia."""
    from sae_italian.evaluation import evaluate
    from sae_italian.evaluation.doctor import examine
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae
    from sae_italian.saes.loading import sae_facts

    facts = sae_facts(CLIC_IT)
    note(record_property, k=facts["k"], d_sae=facts["d_sae"])
    assert facts["d_in"] == 2048 and facts["d_sae"] == 65_536
    sae, model = load_sae(CLIC_IT), load_model("minerva-1b")
    report = examine(sae, model, "wikipedia-it", name=CLIC_IT)
    card = evaluate(sae, model, "wikipedia-it", n_tokens=20_000, loss_tokens=4_000, name=CLIC_IT)
    _note_card(record_property, card)
    assert report.status != "fail", report.text()
    assert card.explained_variance.value > 0.5 and card.l0.value == pytest.approx(facts["k"], rel=0.01)


def test_a_transcoder_of_llama_scope(record_property):
    from sae_italian.saes import hooks_of, load_sae

    sae: Any = load_sae(TRANSCODER)
    note(record_property, architecture=sae.cfg.architecture(), d_sae=sae.cfg.d_sae)
    assert hooks_of(sae) == ("blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out")
    assert sae.W_dec.shape == (32_768, 4096) and all(weight.isfinite().all() for weight in sae.parameters())


@pytest.fixture(scope="module")
def gemma() -> Any:
    from sae_italian.models import load_model

    return load_model("gemma-3-270m")


@pytest.fixture(scope="module")
def ours(gemma, tmp_path_factory) -> Path:
    """An SAE of the same model and layer, trained on Italian Wikipedia by the recipe, in some minutes."""
    from sae_italian.training import load_spec, train

    words = ("corpus=wikipedia-it", f"training_tokens={SEED_TOKENS}", "sae.d_sae=4096", "sae.k=32")
    return train(load_spec("gemma-3-270m", *words), tmp_path_factory.mktemp("ours") / "gemma-L8")


@pytest.mark.parametrize("whose", ["Gemma Scope 2", "ours"])
def test_the_card_on_italian_text(whose, gemma, request, record_property):
    from sae_italian.evaluation import evaluate
    from sae_italian.saes import load_sae

    sae = load_sae(GEMMA_SCOPE if whose == "Gemma Scope 2" else request.getfixturevalue("ours"))
    card = evaluate(sae, gemma, "wikipedia-it", n_tokens=20_000, loss_tokens=2_000, context_size=128, name=whose)
    _note_card(record_property, card)
    assert card.explained_variance.value > 0.5 and card.ce_loss_recovered.value > 0.8


def test_what_an_sae_trained_on_italian_finds_that_theirs_does_not(ours, record_property):
    """The nearest decoder directions between the two: how much of ours is in theirs, and of theirs in ours."""
    from sae_italian.analysis.geometry import geometry
    from sae_italian.saes import load_sae

    found = geometry({"ours": load_sae(ours), "theirs": load_sae(GEMMA_SCOPE)}, sample=2000)
    here, there = found.between  # ours in theirs, theirs in ours
    note(record_property, ours_in_theirs=here.alike.value, theirs_in_ours=there.alike.value, new=here.new.value)
    assert here.above_random.value > 0.2  # the two share directions, far more than chance


@pytest.mark.parametrize("whose", ["Gemma Scope 2", "ours"])
def test_probes_on_gold_labels(whose, gemma, request, record_property, tmp_path):
    """Part of speech, gender, number, ...: one latent, several, a random twin's; `means` of `sae-italian language`."""
    from sae_italian.cli import main

    name = GEMMA_SCOPE if whose == "Gemma Scope 2" else str(request.getfixturevalue("ours"))
    words = ["language", name, "context_size=128", "--model", "gemma-3-270m", "--ud", "micro-italiano"]
    assert main([*words, "--out", str(tmp_path / "language")]) == 0
    means = json.loads((tmp_path / "language" / "language.json").read_text())["means"]
    rows = [row for row in means if not row["shuffled"]]
    note(record_property, **{f"{row['features']}, {row['method']}": row["f1"]["value"] for row in rows})
    assert rows


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_of_the_catalogue_is_read_and_goes_on_where_it_stopped(name, record_property):
    from sae_italian.corpora import CorpusStream, Reader

    stream = CorpusStream(name, Reader(split="train"))
    first = list(islice(stream, 20))
    state = json.loads(json.dumps(stream.state()))
    after = list(islice(stream, 5))
    resumed = CorpusStream(name, Reader(split="train"))
    resumed.load_state(state)
    note(record_property, documents=stream.counts.kept, characters=stream.counts.characters)
    assert len(first) == 20 and all(document.text.strip() for document in first)
    assert list(islice(resumed, 5)) == after


def test_an_upload_that_sends_nothing(trained_sae, mini, record_property, tmp_path):
    import shutil

    from sae_italian.evaluation import evaluate
    from sae_italian.saes import load_sae
    from sae_italian.training.publish import publish

    folder = tmp_path / "L1R-2x"
    shutil.copytree(trained_sae, folder)
    evaluate(load_sae(folder), mini, "micro-italiano", n_tokens=1000).save(folder)
    upload = publish(folder, "nobody/sae-italian-test", dry_run=True)
    note(record_property, files=len(upload.files), bytes=sum(upload.files.values()))
    assert any(name.endswith("sae_weights.safetensors") for name in upload.files)


def test_the_models_own_weights_are_those_of_the_registry(gemma, record_property):
    """What `make real` dequantised against Google's own file, where its terms were accepted."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained("google/gemma-3-270m", dtype=torch.float32)
    name = "model.layers.8.mlp.down_proj.weight"
    here, there = gemma.get_submodule(name.removesuffix(".weight")).weight, theirs.state_dict()[name]
    distance = float((here.float() - there).norm() / there.norm())
    note(record_property, relative_distance=distance)
    assert distance < 0.15  # of four bits


def _note_card(record: Any, card: Any) -> None:
    keys = ("l0", "explained_variance", "explained_variance_per_dimension", "ce_loss_recovered", "kl_recovered", "dead")
    note(record, **{key: getattr(card, key).value for key in keys})


if __name__ == "__main__":  # for the Makefile
    if not reachable():
        sys.stdout.write("no hub: 0 tests\n")
        sys.exit(1)
