"""The commands of causal analyses: `ioi` and `agreement` on a model, `steer`, `ablate` and `tree` on latents."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, positive, sae_name


def add_commands(root: Commands) -> None:
    _task_commands(root)
    _latent_commands(root)


def _task_commands(root: Commands) -> None:
    text = "indirect-object sentences: does the model do them, and which latents carry the name (feature patching)"
    sub = root.add("ioi", _ioi, text)
    sub.add_argument("model")
    sub.add_argument("--sae", action="append", default=[], help="an SAE to patch; again for each to compare with")
    sub.add_argument("--lang", choices=("it", "en"), default="it")
    sub.add_argument("--pairs", type=int, default=50, help="pairs that are patched (default 50)")
    sub.add_argument("--check", type=int, default=200, help="sentences on which the skill is checked (default 200)")
    sub.add_argument("--name-tokens", default="1", help="tokens of a name, or any (default 1)")
    sub.add_argument("--thresholds", type=int, default=50, help="of the elimination (default 50, as in the paper)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--anyway", action="store_true", help="patch also where the model does not do the task")
    sub.add_argument("--out", type=Path, help="a folder for ioi.json and ioi.svg")
    text = "Italian agreement on minimal pairs: gender, number, subject and verb, with and without an attractor"
    sub = root.add("agreement", _agreement, text)
    sub.add_argument("model")
    sub.add_argument("--pairs", type=Path, help="a file in MultiBLiMP's layout (ita.tsv); default: pairs made here")
    sub.add_argument("--n", type=int, default=500, help="pairs made (default 500)")
    sub.add_argument(
        "--sae", action="append", default=[], help="an SAE to patch on the subject's number; again for more"
    )
    sub.add_argument("--patched", type=int, default=50, help="pairs that are patched (default 50)")
    sub.add_argument("--thresholds", type=int, default=50, help="of the elimination (default 50)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, help="a folder for agreement.json, agreement.svg, and number.svg with --sae")


def _latent_commands(root: Commands) -> None:
    sub = root.add("steer", _steer, "what the model writes with a latent's direction added at several strengths")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    sub.add_argument("prompt")
    sub.add_argument("--latent", type=int, required=True)
    sub.add_argument("--strengths", type=float, nargs="+", default=[5.0, 10.0, 20.0], help="in units of its activation")
    sub.add_argument("--new-tokens", type=int, default=24)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub = root.add("ablate", _ablate, "the tokens whose logits move most when a latent is silenced")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    sub.add_argument("prompt")
    sub.add_argument("--latent", type=int, required=True)
    sub.add_argument("--top", type=int, default=10)
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub = root.add("tree", _tree, "the latents of earlier layers that a latent depends on, by ablation")
    sub.add_argument("saes", nargs="+", help="SAEs in the order of their layers; the latent is the last one's")
    sub.add_argument("--latent", type=int, required=True)
    sub.add_argument("--branches", type=int, default=3)
    sub.add_argument("--contexts", type=int, default=20)
    sub.add_argument("--tokens", type=int, default=20_000, help="of the corpus, among which contexts are drawn")
    sub.add_argument("--context-size", type=int, default=64)
    sub.add_argument("--model", help="default: the model in the last SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the last SAE was trained on")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", type=Path, help="a folder for tree.json and tree.svg")


def _write(folder: Path | None, name: str, value: Any, svg: str | None) -> str:
    """Write a result and its picture where asked; return a line that says where."""
    from sae_italian.base.storage import write_json, write_text

    if folder is None:
        return ""
    write_json(folder / f"{name}.json", value)
    if svg is not None:
        write_text(folder / f"{name}.svg", svg)
    return f"\n\n{folder}/{name}.json" + ("" if svg is None else f", {name}.svg")


def _ioi(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.tasks import check_able, ioi_pairs, ioi_score, words_for
    from sae_italian.models import load_model

    for flag, number in (("--pairs", options.pairs), ("--check", options.check), ("--thresholds", options.thresholds)):
        positive(flag, number)
    any_length = options.name_tokens == "any"
    if not any_length and not options.name_tokens.isdecimal():
        raise UsageError(f"--name-tokens is {options.name_tokens!r}; a number or any was expected.")
    model = load_model(options.model)
    words = words_for(options.model, options.lang)
    length = None if any_length else int(options.name_tokens)
    made = ioi_pairs(max(options.check, options.pairs), model.tokenizer, words, n_name_tokens=length, seed=options.seed)
    skill = ioi_score(model, model.tokenizer, made[: options.check])
    value: dict[str, Any] = {"model": options.model, "language": options.lang, "example": made[0]._asdict()}
    value["skill"] = skill.as_dict()
    text = f"{made[0].base} … {made[0].io}\n{skill.text()}; " + _by_kind(skill)
    svg = None
    if options.sae:
        if not options.anyway:
            check_able(skill, "indirect object", options.model)
        found = _patched(options, model, made[: options.pairs])
        value["patching"], svg = found.as_dict(), found.svg()
        text += "\n\n" + found.table()
    return value, text + _write(options.out, "ioi", value, svg)


def _patched(options: argparse.Namespace, model: Any, pairs: Any) -> Any:
    """Patch the SAEs of --sae on the pairs; each goes by its folder's name, or as given where two have the same."""
    from sae_italian.analysis.causal import patch_saes
    from sae_italian.analysis.causal.compare import thresholds
    from sae_italian.saes import load_sae

    names = {name: Path(name).name if Path(name).is_dir() else name for name in options.sae}
    alike = len(set(names.values())) < len(names)
    saes = {name if alike else short: load_sae(name) for name, short in names.items()}
    levels = thresholds(options.thresholds)
    return patch_saes(model, model.tokenizer, saes, pairs, thresholds=levels, seed=options.seed)


def _by_kind(skill: Any) -> str:
    return ", ".join(f"{kind} {share.value:.1%}" for kind, share in skill.by_kind.items())


def _agreement(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.tasks import agreement_pairs, agreement_score, number_pairs, read_minimal_pairs
    from sae_italian.base.storage import write_text
    from sae_italian.models import load_model

    positive("--patched", options.patched)
    positive("--thresholds", options.thresholds)
    pairs = read_minimal_pairs(options.pairs) if options.pairs else agreement_pairs(options.n, seed=options.seed)
    model = load_model(options.model)
    found = agreement_score(model, model.tokenizer, pairs)
    value: dict[str, Any] = {"model": options.model, "pairs": str(options.pairs or "generated"), **found.as_dict()}
    lines = [found.text(), "", "| agreement | right | 95 % interval |", "|---|---|---|"]
    lines += [f"| {kind} | {s.value:.1%} | {s.lo:.1%} to {s.hi:.1%} |" for kind, s in found.by_kind.items()]
    if options.sae:
        patched = _patched(options, model, number_pairs(options.patched, model.tokenizer, seed=options.seed))
        value["patching"] = patched.as_dict()
        lines += ["", "the subject's number, patched:", "", patched.table()]
        if options.out:
            write_text(options.out / "number.svg", patched.svg())
    return value, "\n".join(lines) + _write(options.out, "agreement", value, found.svg())


def _sources(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return SAE and model of a command about one latent."""
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    sae = load_sae(options.sae)
    name = options.model or sae.cfg.metadata.model_name
    if not name:
        raise UsageError("the SAE's metadata does not say which model it is for; give --model.")
    return sae, load_model(name)


def _steer(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.causal import steer

    sae, model = _sources(options)
    found = steer(
        model,
        model.tokenizer,
        sae,
        options.prompt,
        options.latent,
        options.strengths,
        options.new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    return found.as_dict(), found.table()


def _ablate(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.causal import ablate

    positive("--top", options.top)
    sae, model = _sources(options)
    found = ablate(model, model.tokenizer, sae, options.prompt, options.latent, options.top)
    return found.as_dict(), found.table()


def _tree(options: argparse.Namespace) -> Result:
    from sae_italian.analysis.causal import causal_tree, tree_svg
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    for flag in ("branches", "contexts", "tokens", "context_size"):
        positive(f"--{flag.replace('_', '-')}", getattr(options, flag))
    saes = [(Path(sae_name(name)).name, load_sae(name)) for name in options.saes]
    metadata = saes[-1][1].cfg.metadata
    model, corpus = options.model or metadata.model_name, options.corpus or metadata.dataset_path
    for value, flag in ((model, "--model"), (corpus, "--corpus")):
        if not value:
            raise UsageError(f"the SAE's metadata does not say; give {flag}.")
    root = causal_tree(
        load_model(model),
        saes,
        options.latent,
        corpus,
        branches=options.branches,
        n_contexts=options.contexts,
        n_tokens=options.tokens,
        context_size=options.context_size,
        seed=options.seed,
    )
    return root.as_dict(), root.text() + _write(options.out, "tree", root.as_dict(), tree_svg(root))
