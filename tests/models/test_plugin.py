"""Registration happens in processes of their own, so that import order is really what it says (`tests/fresh.py`)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fresh
from tests.models.hub import SHRUNKEN, put_in_cache, random_model, save_model


def run(code: str) -> str:
    done = fresh.run(["-c", code])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def in_a_new_interpreter(code: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("module", ["architectures", "tied", "releases", "loading"])
def test_saelens_is_told_whichever_of_our_modules_imports_it(module):
    code = f"""import sae_italian.saes.{module}, sae_lens
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
print(len({{"sparse_topk", "transcoder", "tied"}} & set(SAE_TRAINING_CLASS_REGISTRY)), "topk_transcoder" in SAE_CLASS_REGISTRY)"""
    assert run(code) == "3 True"


def test_import_is_light_and_loads_no_torch():
    code = "import sys, sae_italian; print('torch' in sys.modules or 'transformer_lens' in sys.modules)"
    out, seconds = fresh.told_in("-c", code)
    assert out == "False\n" and seconds < 1  # 0.1 s; the process itself included


@pytest.mark.parametrize(
    "first", ["sae_italian, transformer_lens", "transformer_lens, sae_italian", "sae_italian, sae_lens"]
)
def test_names_resolve_whatever_is_imported_first(first):
    code = f"""import {first}
from transformer_lens.loading_from_pretrained import get_official_model_name as name
print(name('minerva-350m'), name('MINERVA-1B'), name('sapienzanlp/Minerva-7B-base-v1.0'))"""
    assert run(code).split() == [
        "sapienzanlp/Minerva-350M-base-v1.0",
        "sapienzanlp/Minerva-1B-base-v1.0",
        "sapienzanlp/Minerva-7B-base-v1.0",
    ]


def test_registration_is_idempotent_and_replaces_nothing():
    code = """import transformer_lens.supported_models as t
names, aliases = t.OFFICIAL_MODEL_NAMES, t.MODEL_ALIASES
before = (list(names), {k: list(v) for k, v in aliases.items()})
import sae_italian, sae_italian.plugin as p
from sae_italian.models import catalogue
p.register_models(); once = (list(names), {k: list(v) for k, v in aliases.items()})
p.install(); p.register_models()
assert (t.OFFICIAL_MODEL_NAMES is names) and (t.MODEL_ALIASES is aliases)
assert once == (list(names), aliases), 'registering twice changed something'
assert names[:len(before[0])] == before[0] and all(aliases[k] == v for k, v in before[1].items())
print(len(names) - len(before[0]), sum(name in before[0] for name in catalogue()))"""
    from sae_italian.models import catalogue

    added, known = map(int, run(code).split())
    assert added + known == len(catalogue()) and known == 1, "TransformerLens knows gemma-3-270m itself"


def test_an_alias_of_another_model_is_not_taken_over():
    code = """import transformer_lens, sae_italian.plugin
from sae_italian.models import ModelEntry, catalogue
catalogue()['me/mine'] = ModelEntry('me/mine', ['gpt2'], '', '', False, '', '')
try: sae_italian.plugin.register_models()
except ValueError as e: print('refused' if 'gpt2' in str(e) else e)"""
    assert run(code) == "refused"


def test_hooked_transformer_loads_minerva_by_alias_from_a_hub_cache(tmp_path):
    """A shrunken Minerva in the hub's own cache layout: what `from_pretrained("minerva-350m")` does on a user's disk."""
    from sae_italian.models import catalogue, load_model

    mini = load_model("sae-italian-mini")
    revision = "0" * 40
    repo = tmp_path / "models--sapienzanlp--Minerva-350M-base-v1.0"
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    for file in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(f"{catalogue()['sae-italian-mini'].official}/{file}", snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    code = """import sae_italian
from transformer_lens import HookedTransformer
model = HookedTransformer.from_pretrained('minerva-350m')
print(model.cfg.model_name, model.cfg.d_model)"""
    out = in_a_new_interpreter(code, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert out.split()[-1] == str(config["hidden_size"]) == str(mini.config.hidden_size)
    assert "Minerva-350M" in out


def test_every_way_in_resolves_aliases_and_hub_ids(tmp_path):
    """TransformerBridge in any case, SAELens' load_model, and the alias for AutoModelForCausalLM, which is ours to resolve."""
    minerva, hub = "sapienzanlp/Minerva-350M-base-v1.0", tmp_path / "hub"
    put_in_cache(hub, minerva, save_model(random_model(SHRUNKEN[minerva]), tmp_path / "saved"))
    code = f"""import huggingface_hub.constants, sae_italian
huggingface_hub.constants.HF_HUB_CACHE = {str(hub)!r}
from sae_italian.models import resolve
from transformer_lens.model_bridge import TransformerBridge
from sae_lens.load_model import load_model
official = 'sapienzanlp/Minerva-350M-base-v1.0'
widths = [TransformerBridge.boot_transformers(name).cfg.d_model for name in ('minerva-350m', 'MINERVA-350M', official)]
widths += [load_model('HookedTransformer', name, device='cpu').cfg.d_model for name in ('Minerva-350m', official)]
widths += [load_model('AutoModelForCausalLM', resolve(name).saved_name, device='cpu').model.config.hidden_size
           for name in ('MINERVA-350M', official)]
print(*widths)"""
    assert run(code).split() == ["288"] * 7


def test_our_aliases_are_taken_without_a_warning_or_a_path():
    code = """import logging, sae_italian
from transformer_lens.model_bridge import TransformerBridge
logging.basicConfig(format="%(message)s")
assert TransformerBridge.boot_transformers("SAE-Italian-Mini").cfg.n_layers == 4
logging.warning("DEPRECATED: You are using a deprecated, model_name alias 'gpt2-small'")"""
    done = fresh.run(["-c", code], check=True)
    assert "Mini" not in done.stderr and "models/mini" not in done.stderr
    assert "alias 'gpt2-small'" in done.stderr  # others' are told as before


def test_the_public_names_are_listed_and_typed():
    import sae_italian

    assert set(sae_italian.__all__) <= set(dir(sae_italian)) and {"load_model", "train"} <= set(sae_italian.__all__)
    assert (Path(sae_italian.__file__).parent / "py.typed").is_file()
