"""The catalogue is complete, says nothing twice, and never overrules a loaded config."""

from dataclasses import replace
from pathlib import Path

import pytest

from sae_italian.base.errors import UsageError
from sae_italian.cli import main
from sae_italian.models import catalogue, load_model, load_model_config, resolve
from sae_italian.models.catalogue import config_differences, config_facts
from tests.models.hub import REVISION, put_in_cache

ASKED_FOR = (
    "Minerva-350M-base", "Minerva-1B-base", "Minerva-3B-base", "Minerva-7B-base", "Minerva-7B-instruct", "GePpeTto",
    "gpt2-small-italian", "gpt2-small-italian-embeddings", "gpt2-medium-italian-embeddings", "ita_latn_10mb",
    "ita_latn_100mb", "zagreus-0.4B", "nesso-0.4B", "Velvet-2B", "hplt2c_ita", "modello-italia-9b", "LLaMAntino-2-7b",
    "ANITA", "sae-italian-mini",
)  # fmt: skip


@pytest.mark.parametrize("name", ASKED_FOR)
def test_every_model_asked_for_is_there(name):
    entries = [entry for entry in catalogue().values() if name in entry.name]
    assert entries and all(e.licence and e.tokenizer and e.note and e.architecture for e in entries)


def test_aliases_are_lower_case_and_belong_to_one_model():
    aliases = [alias for entry in catalogue().values() for alias in entry.aliases]
    assert len(aliases) == len(set(aliases)) and all(alias == alias.lower() for alias in aliases)
    for entry in catalogue().values():
        for name in (entry.name, entry.name.upper(), *entry.aliases, entry.aliases[0].upper()):
            assert resolve(name).saved_name == entry.name


def test_the_mini_models_entry_is_its_config():
    entry = catalogue()["sae-italian-mini"]
    assert config_differences(entry, load_model_config("mini")) == []
    assert config_facts(load_model_config("mini"))["d_head"] == entry.d_head


def test_a_window_that_the_catalogue_does_not_know_is_a_difference():
    """None means no window where the entry states its sizes, and nothing where it states none."""
    entry, config = catalogue()["sapienzanlp/Minerva-7B-base-v1.0"], load_model_config("mini")
    assert entry.window is None and entry.d_model is not None and config.sliding_window == 64
    assert "window is 64 in the loaded config, None in the catalogue" in config_differences(entry, config)
    assert not any("window" in each for each in config_differences(replace(entry, d_model=None), config))


def test_the_loaded_config_wins_and_the_difference_is_reported(cached_hub, capsys):
    with pytest.warns(UserWarning, match="d_model is 288 in the loaded config, 1152 in the catalogue"):
        model = load_model("minerva-350m")
    assert model.config.hidden_size == 288 and any("288" in line for line in model.loaded_from["differences"])
    assert main(["models", "show", "minerva-350m"]) == 0
    out = capsys.readouterr().out
    assert "d_model       288" in out and "1152 in the catalogue" in out and "the tokenizer adds 1" in out


def test_a_revision_can_be_pinned_and_is_recorded(cached_hub, tmp_path):
    other = "f" * 40
    name = "sapienzanlp/Minerva-350M-base-v1.0"
    snapshot = cached_hub / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION
    main_ref = snapshot.parents[1] / "refs" / "main"
    put_in_cache(cached_hub, name, snapshot, revision=other)
    main_ref.write_text(REVISION)
    with pytest.warns(UserWarning):
        assert load_model(f"minerva-350m@{other}").loaded_from["revision"] == other
        assert load_model("minerva-350m").loaded_from["revision"] == REVISION
    with pytest.raises(UsageError, match=f"--revision {'e' * 40}"):
        load_model_config(f"minerva-350m@{'e' * 40}")
    with pytest.raises(UsageError, match="has no revisions"):
        resolve("mini@main")


def test_context_and_device_are_checked():
    with pytest.raises(UsageError, match="allows 1 to 512 tokens"):
        load_model("mini", "hooked", context=1000)
    with pytest.raises(UsageError, match="Valid: auto, cpu"):
        load_model("mini", device="gpu0")
    assert load_model("mini", "hooked", context=300).cfg.n_ctx == 300


def test_a_path_is_a_name_too(tmp_path):
    folder = Path(resolve("mini").load_from)
    assert resolve(folder).saved_name == "sae-italian-mini" and load_model_config(folder).vocab_size > 0
    with pytest.raises(UsageError, match="model 5 is neither"):
        resolve(5)  # pyright: ignore
