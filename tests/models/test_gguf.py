"""GGUF files: dequantised once, tokenizer and record beside the weights; and models that come as wheels."""

import json
import os
import re
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import sha256_file
from sae_italian.cli import main
from sae_italian.models import catalogue, load_model, load_tokenizer, resolve
from sae_italian.models.catalogue import ModelEntry

gguf = pytest.importorskip("gguf")
ours = import_module("sae_italian.models.catalogue")  # the package has a function of that name
UMASK = os.umask(0)
os.umask(UMASK)
D, LAYERS, HEADS, KV, MLP = 32, 2, 4, 2, 64


def byte_letters() -> list[str]:
    """The 256 letters by which byte-level tokenizers write bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def write_gguf(
    path: Path, *, architecture: str = "qwen2", quantised: bool = False, parts: int = 0, **said: str
) -> dict[str, np.ndarray]:
    """Write a small random model of Qwen 2's family, with a byte tokenizer, and return its weights by GGUF's names."""
    vocabulary = [*byte_letters(), "ci", "ao", "ciao", "<|endoftext|>"]
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(vocabulary), D), "output": (len(vocabulary), D), "output_norm": (D,)}
    for layer in range(LAYERS):
        blocks = {
            "attn_norm": (D,), "attn_q": (D, D), "attn_k": (D * KV // HEADS, D), "attn_v": (D * KV // HEADS, D),
            "attn_output": (D, D), "ffn_norm": (D,), "ffn_gate": (MLP, D), "ffn_up": (MLP, D), "ffn_down": (D, MLP),
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in blocks.items()}
    weights = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v"):
            rows = len(weights[f"blk.{layer}.{part}.weight"])
            weights[f"blk.{layer}.{part}.bias"] = random.normal(size=rows).astype(np.float32)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if quantised else gguf.LlamaFileType.ALL_F32)
    if parts:
        writer.add_uint16("split.count", parts)
    for key, value in said.items():
        writer.add_string(f"general.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(vocabulary) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["c i", "a o", "ci ao"])
    writer.add_eos_token_id(len(vocabulary) - 1)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in weights.items():
        if quantised and weight.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A folder of imported models of the test's own."""
    monkeypatch.setattr(ours, "models_folder", lambda: tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize("quantised", [False, True])
def test_weights_tokenizer_and_record_come_through(quantised, tmp_path, home):
    file = tmp_path / "piccolo.gguf"
    weights = write_gguf(file, quantised=quantised, license="apache-2.0")
    assert main(["models", "import", str(file), "--as", "mio/piccolo", "--json"]) == 0
    record = json.loads((home / "mio--piccolo" / "gguf.json").read_text())
    assert record["sha256"] == sha256_file(file) and record["licence"] == "apache-2.0"
    rights = {path.name: path.stat().st_mode & 0o777 for path in (home / "mio--piccolo").iterdir()}
    assert set(rights.values()) == {0o666 & ~UMASK}, rights
    assert record["quantisation"] == ("MOSTLY_Q8_0" if quantised else "ALL_F32")
    assert record["tensors"].get("Q8_0", 0) == (2 + 7 * LAYERS if quantised else 0)
    model = load_model("mio/piccolo")
    assert model.loaded_from["name"] == "mio/piccolo" and model.loaded_from["quantisation"] == record["quantisation"]
    up = model.model.layers[1].mlp.up_proj.weight
    expected = torch.tensor(weights["blk.1.ffn_up.weight"])
    # bfloat16 keeps 8 bits; Q8_0 has 127 steps up to the largest of 32 values
    assert (up - expected).abs().max() <= expected.abs().max() / (100 if quantised else 250)
    text = "ciao, perché no?"
    assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text
    assert model.tokenizer("ciao").input_ids == [258]


def test_a_file_is_a_name_and_is_converted_once(tmp_path, home):
    file = tmp_path / "piccolo.gguf"
    write_gguf(file)
    first = load_model(str(file))
    written = [path.stat().st_mtime_ns for path in home.rglob("*.safetensors")]
    assert len(written) == 1
    again = load_model(first.loaded_from["name"])
    assert again.loaded_from["name"] == str(file.resolve())
    assert [path.stat().st_mtime_ns for path in home.rglob("*.safetensors")] == written
    assert load_tokenizer(str(file)).is_fast


@pytest.mark.parametrize("quantised", [False, True])
def test_all_backends_agree_on_it(quantised, tmp_path, capsys):
    write_gguf(tmp_path / "piccolo.gguf", quantised=quantised)
    assert main(["models", "check", str(tmp_path / "piccolo.gguf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and not found["left_out"]
    assert found["differences"]["bridge logits (over their spread)"] > 0


@pytest.mark.parametrize("kept", [0, 3, 40, 3_000, 12_000, -100])
@pytest.mark.parametrize("quantised", [False, True])
def test_a_file_cut_short_says_what_is_there_and_what_is_asked_for(kept, quantised, tmp_path, home, capsys):
    file = tmp_path / "piccolo.gguf"
    write_gguf(file, quantised=quantised)
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    there = f"{len(whole[:kept]):,} bytes, its header"
    assert main(["models", "import", str(file), "--as", "x"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(file) in told, told
    if kept in (12_000, -100):  # the header is whole, and knows how long the file was
        assert f"it has {there} asks for at least {len(whole):,}. Download it again." in told, told
    elif kept:
        asked = re.search(f"it has {there} alone takes at least ([0-9,]+)[.]", told)
        assert asked and len(whole[:kept]) < int(asked[1].replace(",", "")) < 12_000, told
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_damaged_header_is_one_line_of_what_is_wrong(tmp_path, capsys):
    """Bytes of the header changed at random: nothing hangs, and nothing that numpy says comes through."""
    file, random = tmp_path / "piccolo.gguf", np.random.default_rng(0)
    write_gguf(file)
    whole, told = file.read_bytes(), set()
    for at in random.integers(4, 1_200, 150):
        file.write_bytes(whole[:at] + random.bytes(8) + whole[at + 8 :])
        try:
            ours._facts(file)
        except DataError as error:
            told.add(re.sub(r"[0-9,]+", "N", str(error).removeprefix(f"{file} is no GGUF file or a damaged one: ")))
    wrong = {
        each for each in told if not re.match("it has N bytesN its header|.*(valid|codec|Duplicate|version)", each)
    }
    assert len(told) > 3 and not wrong


def test_other_files_are_named(tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(DataError, match="other.gguf is no GGUF file or a damaged one: GGUF magic invalid"):
        ours.import_gguf(other, "x")
    with pytest.raises(UsageError, match="does not exist"):
        load_model(str(tmp_path / "missing.gguf"))
    unknown = tmp_path / "unknown.gguf"
    write_gguf(unknown, architecture="pippo")
    with pytest.raises(UsageError, match="pippo"):
        ours.import_gguf(unknown, "x")


def test_a_part_of_a_split_file_says_how_to_join(tmp_path):
    part, renamed = tmp_path / "molto grande-00002-of-00003.gguf", tmp_path / "parte.gguf"
    for file, first in ((part, f"'{tmp_path}/molto grande-00001-of-00003.gguf'"), (renamed, "FIRST_PART.gguf")):
        write_gguf(file, parts=3)
        with pytest.raises(UsageError) as error:
            ours.import_gguf(file, "x")
        assert "is one of the 3 parts of a split file" in str(error.value)
        assert f"`llama-gguf-split --merge {first} JOINED.gguf`" in str(error.value)  # it wants the first one


def test_one_part_of_one_is_a_whole_file(tmp_path):
    file = tmp_path / "intero-00001-of-00001.gguf"
    write_gguf(file, parts=1)
    assert load_model(str(file)).loaded_from["quantisation"] == "ALL_F32"


def test_names_are_taken_once_and_nothing_foreign_is_replaced(tmp_path, home):
    file = tmp_path / "piccolo.gguf"
    write_gguf(file)
    ours.import_gguf(file, "nome")
    with pytest.raises(UsageError, match="taken"):
        ours.import_gguf(file, "nome")
    ours.import_gguf(file, "nome", overwrite=True)
    (home / "tesi").mkdir()
    (home / "tesi" / "tesi.txt").write_text("mia")
    with pytest.raises(UsageError, match="was not written by"):
        ours.import_gguf(file, "tesi", overwrite=True)
    assert (home / "tesi" / "tesi.txt").read_text() == "mia"
    assert main(["models", "import", str(file), "--as", "Minerva-1B"]) == 2  # it would hide the one of the catalogue
    for name in ("../su", "/via", ""):
        with pytest.raises(UsageError, match="no name for a model"):
            ours.import_gguf(file, name)


# --- models that come as wheels: a registry of the tests' own, which the real pip installs from -------------------------


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder of wheels that stands for the registry, and the entry of a model that comes from it."""
    file = tmp_path / "parte.gguf"
    write_gguf(file)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "modello_finto-1.0.dist-info"
    code = "from pathlib import Path\ndef assemble(to):\n    Path(to).write_bytes((Path(__file__).parent / 'parte').read_bytes())\n"
    with zipfile.ZipFile(wheels / "modello_finto-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("modello_finto/__init__.py", code)
        wheel.write(file, "modello_finto/parte")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: modello-finto\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("SAE_ITALIAN_ACCEPT_TERMS", raising=False)
    come_from = {
        "package": "modello-finto==1.0",
        "module": "modello_finto",
        "sha256": sha256_file(file),
        "terms": "https://x",
    }
    entry = ModelEntry(
        "chi/modello-finto", ("modello-finto",), "Qwen2ForCausalLM", "Finta", False, "", "", wheels=come_from
    )
    monkeypatch.setitem(catalogue(), entry.name, entry)
    return wheels


@pytest.mark.parametrize("with_terms", [True, False])
def test_a_model_is_fetched_checked_and_converted(with_terms, registry, home, capsys):
    if with_terms:
        with zipfile.ZipFile(registry / "modello_finto-1.0-py3-none-any.whl", "a") as wheel:
            wheel.writestr("modello_finto/data/FINTA_TERMS.html", "<p>si può fare</p>")
    assert main(["models", "fetch", "modello-finto", "--accept-terms"]) == 0
    printed, terms = capsys.readouterr(), home / "chi--modello-finto" / "FINTA_TERMS.html"
    assert "https://x" in printed.err
    assert re.search(f"terms +{terms if with_terms else 'https://x'}\n", printed.out), printed.out
    assert not with_terms or terms.read_text() == "<p>si può fare</p>"  # they can be read without a network
    record = ours.record_of(resolve("modello-finto").load_from)
    assert record is not None and record["file"].startswith("modello-finto")  # the package, not a folder that is gone
    assert load_model("modello-finto").loaded_from["name"] == "chi/modello-finto"
    assert main(["models", "fetch", "modello-finto"]) == 0  # it is there: nothing is asked or fetched again


def test_terms_that_are_not_accepted_fetch_nothing(registry, home, capsys):
    assert main(["models", "fetch", "modello-finto"]) == 2
    assert "were not accepted" in capsys.readouterr().err and not home.exists()


def test_a_registry_without_the_model_is_one_line(registry, home, capsys):
    (registry / "modello_finto-1.0-py3-none-any.whl").unlink()
    assert main(["models", "fetch", "modello-finto", "--accept-terms"]) == 2
    error = capsys.readouterr().err
    assert "could not be installed from the package registry" in error and "Traceback" not in error
    assert list(home.iterdir()) == []


def test_half_a_wheel_is_one_line(registry, home, capsys):
    wheel = registry / "modello_finto-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:2_000])
    assert main(["models", "fetch", "modello-finto", "--accept-terms"]) == 2
    assert "could not be installed" in capsys.readouterr().err and list(home.iterdir()) == []


def test_another_hash_is_not_kept(registry, home):
    entry = catalogue()["chi/modello-finto"]
    assert entry.wheels
    entry.wheels["sha256"] = "0" * 64
    with pytest.raises(DataError, match="expected 0000"):
        ours.fetch_model(entry)
    assert list(home.iterdir()) == []


def test_a_small_disk_and_a_model_of_the_hub_are_said(registry, monkeypatch):
    with pytest.raises(UsageError, match="comes from the hub"):
        ours.fetch_model(catalogue()["sapienzanlp/Minerva-350M-base-v1.0"])
    monkeypatch.setattr(ours, "FETCH_BYTES", 1e18)
    with pytest.raises(UsageError, match="are free"):
        ours.fetch_model(catalogue()["chi/modello-finto"])


def test_a_model_that_was_not_fetched_says_how_to(registry, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="`sae-italian models fetch modello-finto` fetches it"):
        load_model("modello-finto")
