"""The command `graph`: the attribution graph of a prompt, and whether it holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.options import Result, key_values

SETTINGS = {
    "max_nodes": 4096,
    "batch": 16,
    "target": "",
    "against": "",
    "check": 0,
    "study": 0,
    "memory": 0.0,
    "labels": "",
}


def graph(
    model: str, transcoders: Path, prompt: str, /, *words: str, out: Path | None = None, overwrite: bool = False
) -> Result:
    """Draw which latents lead from a prompt to the next token: an exact graph of the model with its norms and patterns frozen.

    Args:
        model: Name, hub id or folder of the model.
        transcoders: Folder of a transcoder, or of several, one for each layer (a suite's).
        prompt: The text whose next token is explained; with study=N a case (agreement, participle, ioi) or a file with a
            prompt a line.
        words: max_nodes=N, latents that become nodes (default: 4096); batch=N, targets of a backward pass (default: 16);
            target=TEXT, the token to explain (default: the likeliest that cover 95 %); against=TEXT, the token whose logit is
            taken from it (default: the mean of all); check=N, latents that are taken away in the real model, beside random
            transcoders (default: 0, none); memory=N, 10^9 bytes that edges may take (default: what is free);
            labels=FOLDER, with the transcoders' feature caches, whose contexts and explanations the page shows (default:
            none); study=N, graphs of so many prompts, with intervals over them, beside random transcoders, attribution
            patching and gold labels (default: 0, one graph).
        out: Folder for the page (index.html), graph.json, graph.npz, graph.svg and neuronpedia.json; a graph that was
            interrupted goes on in it. Nothing is written without it.
        overwrite: Replace a graph of other settings in the folder. Default: no.
    """
    from sae_italian.base.storage import claimed

    settings = key_values(words, SETTINGS)
    make = _study if settings["study"] else _graph
    if out is None:
        return make(model, transcoders, prompt, settings, None)
    spec = {"model": model, "transcoders": transcoders, "prompt": prompt, **settings}
    changeable = ("batch", "check", "memory", "labels")
    with claimed(out, "graph", spec, resume=True, overwrite=overwrite, changeable=changeable):
        return make(model, transcoders, prompt, settings, out)


def _study(model: str, transcoders: Path, case: str, settings: dict[str, Any], out: Path | None) -> Result:
    from sae_italian.base.report import plain
    from sae_italian.base.storage import write_json, write_text
    from sae_italian.circuits.study import study

    loaded, saes = _loaded(model, transcoders)
    sizes = {"max_nodes": settings["max_nodes"], "batch": settings["batch"]}
    found = study(loaded, saes, case, settings["study"], **sizes)
    value, text = {**plain(found), "estimates": plain(found.estimates())}, found.text()
    if out is not None:
        write_json(out / "result.json", value)
        write_text(out / "graph.study.svg", found.svg())
        text += f"\n\n{out}/result.json, graph.study.svg"
    return Result(value, text)


def _graph(model: str, transcoders: Path, prompt: str, settings: dict[str, Any], out: Path | None) -> Result:
    from sae_italian.base.report import plain
    from sae_italian.browser.graph import latents_of
    from sae_italian.circuits.check import check
    from sae_italian.circuits.edges import attribute
    from sae_italian.circuits.graph import scores
    from sae_italian.circuits.show import summary

    loaded, saes = _loaded(model, transcoders)
    wanted, against = (_token(loaded.tokenizer, settings[key]) for key in ("target", "against"))
    if against and not wanted:
        raise UsageError(f"against={settings['against']} needs target=TEXT, the token whose logit it is taken from.")
    how: dict[str, Any] = {"max_nodes": settings["max_nodes"], "batch": settings["batch"], "resume": out}
    how |= {"logits": wanted, "against": against[0] if against else None, "memory": settings["memory"] or None}
    found = attribute(loaded, saes, prompt, **how)
    value = {"prompt": prompt, "model": model, "n_active": found.n_active, **plain(scores(found))}
    latents = {}
    if settings["labels"]:
        latents = latents_of(Path(settings["labels"]), saes, found, out or Path(), loaded.tokenizer)
    text = summary(found, {key: told["label_en"] for key, told in latents.items()})
    checked = check(loaded, saes, found, n_latents=settings["check"]) if settings["check"] else None
    if checked:
        value["check"] = plain(checked)
        text += f"\n\n{checked.text()}"
    if out is not None:
        text += f"\n\n{_write(out, found, value, latents, checked)}"
    return Result(value, text)


def _loaded(name: str, transcoders: Path) -> tuple[Any, list[Any]]:
    """Return the model and the transcoders, and say where these were trained on another model, as a fine-tune's may be."""
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    folders = transcoder_folders(transcoders)
    model, saes = load_model(name), [load_sae(folder) for folder in folders]
    there = model.loaded_from["name"]
    own = {str(sae.cfg.metadata.model_name or there) for sae in saes}
    if other := [each for each in sorted(own) if Path(each).name != Path(there).name]:
        sys.stderr.write(f"The transcoders were trained on {other[0]!r}; the model here is {there!r}.\n")
    return model, saes


def transcoder_folders(folder: Path) -> list[Path]:
    """Return a transcoder's folder, or those of a suite's; SAEs of other sites beside them are left out."""
    from sae_italian.base.storage import read_json

    if (folder / "cfg.json").exists():
        return [folder]
    found = [path.parent for path in sorted(folder.glob("*/cfg.json"))]
    configs = [(path, read_json(path / "cfg.json")) for path in found]
    mine = [
        path for path, config in configs if isinstance(config, dict) and "transcoder" in str(config.get("architecture"))
    ]
    if not mine:
        raise UsageError(f"{folder} holds no transcoders. Train some with `sae-italian train mini/transcoders`.")
    return mine


def _token(tokenizer: Any, text: str) -> list[int] | None:
    """Return the one token of a text that follows a prompt. Raises: UsageError when it has several."""
    if not text:
        return None
    ids = tokenizer(f" {text.strip()}", add_special_tokens=False).input_ids
    if len(ids) != 1:
        parts = " + ".join(tokenizer.convert_ids_to_tokens(ids))
        raise UsageError(f"{text} has {len(ids)} tokens ({parts}); one was expected. Give its first.")
    return ids


def _write(out: Path, found: Any, value: dict[str, Any], latents: Any, checked: Any) -> str:
    from sae_italian.base.storage import write_json, write_text
    from sae_italian.browser.graph import write_graph_page
    from sae_italian.circuits.check import check_svg
    from sae_italian.circuits.show import neuronpedia, svg

    found.save(out)
    write_text(out / "graph.svg", svg(found))
    if checked:
        write_text(out / "graph.check.svg", check_svg(checked))
    labels = {key: told["label_en"] for key, told in latents.items()}
    write_json(out / "neuronpedia.json", neuronpedia(found, found.prompt, labels))
    write_json(out / "result.json", value)
    write_graph_page(out, found, latents, checked)
    return f"{out}/index.html, graph.json, graph.npz, graph.svg, neuronpedia.json, result.json"
