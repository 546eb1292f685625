"""The commands on causes: `ioi` and `agreement` on a model, `steer` and `tree` on latents, `graph` on transcoders."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import PositiveInt

import sae_italian
from sae_italian.base.errors import UsageError
from sae_italian.base.labels import read_words
from sae_italian.base.pace import one_of
from sae_italian.base.report import plain, save_result, table
from sae_italian.base.storage import claimed, read_json, write_json, write_text
from sae_italian.cli import Count, Language, Model, Result, Sae, Seed, Subject, key_values, own_words, short_names

Latent = Annotated[int, Parameter(help="Number of the latent.")]
Thresholds = Annotated[Count, Parameter(help="Thresholds of the elimination, from 1e-5 to 1 nat; 50 as in the paper.")]


def ioi(
    model: Subject,
    /,
    *words: str,
    sae: list[str] | None = None,
    language: Language = "it",
    n_pairs: Count = 50,
    check: Count = 200,
    thresholds: Thresholds = 50,
    anyway: bool = False,
    seed: Seed = 0,
    out: Path | None = None,
) -> Result:
    """Ask whether a model goes on with the indirect object, and which latents carry the name (feature patching).

    Args:
        words: name_tokens=N, the tokens that every name has, or name_tokens=any; default: 1.
        sae: An SAE to patch; again for each to compare with; default: none is patched.
        language: Language of the sentences: it or en.
        n_pairs: Pairs of sentences that are patched.
        check: Sentences on which the skill is checked first.
        anyway: Patch also where the model does not do the task.
        out: Folder for ioi.json and ioi.svg; nothing is written without it.
    """
    from sae_italian.analysis import check_able, ioi_pairs, ioi_score, words_for

    name_tokens = read_words(words, {"name_tokens": PositiveInt | Literal["any"]}).get("name_tokens", 1)
    loaded = sae_italian.load_model(model)
    drawn: dict[str, Any] = {"n_name_tokens": None if name_tokens == "any" else name_tokens, "seed": seed}
    pairs = ioi_pairs(max(check, n_pairs), loaded.tokenizer, words_for(model, language), **drawn)
    with one_of(2 if sae else 1, alike=False):
        skill = ioi_score(loaded, loaded.tokenizer, pairs[:check])
    value = {"model": model, "language": language, "example": plain(pairs[0]), "skill": plain(skill)}
    by_kind = ", ".join(f"{kind} {share.value:.1%}" for kind, share in skill.by_kind.items())
    text, pictures = f"{pairs[0].base} … {pairs[0].io}\n{skill.text()}; {by_kind}", {}
    if sae:
        if not anyway:
            check_able(skill, "indirect object", model)
        found = _patched(loaded, sae, pairs[:n_pairs], thresholds, seed)
        value["patching"], pictures["ioi"] = found.as_dict(), found.svg()
        text += f"\n\n{found.table()}"
    return _written(out, "ioi", value, text, pictures)


def agreement(
    model: Subject,
    /,
    *,
    pairs_file: Path | None = None,
    language: Language = "it",
    check: Count = 500,
    sae: list[str] | None = None,
    n_pairs: Count = 50,
    thresholds: Thresholds = 50,
    seed: Seed = 0,
    out: Path | None = None,
) -> Result:
    """Ask a model for agreement on minimal pairs: gender, number, subject and verb, with and without an attractor.

    Args:
        pairs_file: Pairs in MultiBLiMP's layout (ita.tsv, or the same as .jsonl or .parquet); default: pairs made here.
        language: Language of the pairs made here: it or en, which has no gender.
        check: Pairs that are made, in turn of each kind.
        sae: An SAE to patch on the subject's number; again for each to compare with; default: none.
        n_pairs: Pairs of subjects that are patched.
        out: Folder for agreement.json, agreement.svg, and number.svg with --sae; nothing is written without it.
    """
    from sae_italian.analysis.tasks import agreement_pairs, number_pairs, read_minimal_pairs, score_choices

    pairs = read_minimal_pairs(pairs_file) if pairs_file else agreement_pairs(check, seed=seed, language=language)
    loaded = sae_italian.load_model(model)
    with one_of(2 if sae else 1, alike=False):
        found = score_choices(loaded, loaded.tokenizer, pairs)
    value = {"model": model, "pairs": str(pairs_file or f"generated, {language}"), **plain(found)}
    rows = [(kind, f"{s.value:.1%}", f"{s.lo:.1%} to {s.hi:.1%}") for kind, s in found.by_kind.items()]
    text = f"{found.text()}\n\n{table('agreement | right | 95 % interval', rows)}"
    pictures = {"agreement": found.svg()}
    if sae:
        subjects = number_pairs(n_pairs, loaded.tokenizer, seed=seed, language=language)
        patched = _patched(loaded, sae, subjects, thresholds, seed)
        value["patching"], pictures["number"] = patched.as_dict(), patched.svg()
        text += f"\n\nthe subject's number, patched:\n\n{patched.table()}"
    return _written(out, "agreement", value, text, pictures)


def _patched(model: Any, names: list[str], pairs: Any, n_thresholds: int, seed: int) -> Any:
    """Patch the SAEs of --sae on the pairs."""
    from sae_italian.analysis import patch_saes, thresholds

    saes = {short: sae_italian.load_sae(name) for short, name in short_names(names).items()}
    return patch_saes(model, model.tokenizer, saes, pairs, thresholds=thresholds(n_thresholds), seed=seed)


def _written(out: Path | None, name: str, value: dict[str, Any], text: str, pictures: dict[str, str]) -> Result:
    """Return the result; written to the folder where one is asked for."""
    if out is not None:
        save_result(out, name, value, **pictures)
        text += f"\n\n{out}/{', '.join([f'{name}.json', *(f'{picture}.svg' for picture in pictures)])}"
    return Result(value, text)


def steer(
    sae: Sae,
    prompt: str,
    /,
    *,
    latent: Latent,
    strengths: Annotated[list[float], Parameter(consume_multiple=True)] = [5.0, 10.0, 20.0],  # noqa: B006
    new_tokens: int = 24,
    temperature: float = 0.0,
    ablate: bool = False,
    top: Count = 10,
    model: Model = None,
    seed: Seed = 0,
) -> Any:
    """Show what a model writes with a latent's direction added, or which logits move when the latent is silenced.

    Args:
        prompt: The text that the model goes on from.
        strengths: How much of the direction is added, in units of the latent's activation; one text for each.
        new_tokens: Tokens that are written.
        temperature: 0 takes the likeliest token; above, tokens are sampled.
        ablate: Silence the latent wherever the prompt makes it active, instead of adding it.
        top: With --ablate: logits shown that fall, and as many that rise.
    """
    from sae_italian import analysis

    loaded, subject, _ = sae_italian.open_sae(sae, model, "none")
    start = subject, subject.tokenizer, loaded, prompt, latent
    if ablate:
        return analysis.ablate(*start, top)
    return analysis.steer(*start, strengths, new_tokens, temperature=temperature, seed=seed)


def tree(
    *saes: str,
    latent: Latent,
    tokens: Count = 20_000,
    context_size: Count = 64,
    model: Model = None,
    corpus: str | None = None,
    seed: Seed = 0,
    out: Path | None = None,
) -> Result:
    """Draw which latents of earlier layers a latent depends on, by ablation.

    Args:
        saes: SAEs in the order of their layers, the latent is the last one's; then branches=N, children of a latent that
            are followed (default: 3), and contexts=N, in which each is looked at (default: 20).
        tokens: Tokens of the corpus among which contexts are drawn.
        context_size: Tokens of a context.
        corpus: Local file or folder, catalogue name, or micro-italiano; default: what the last SAE was trained on.
        out: Folder for tree.json and tree.svg; nothing is written without it.
    """
    from sae_italian.analysis.tree import causal_tree

    sizes, names = own_words(saes, {"branches": 3, "contexts": 20})
    *others, (name, target) = short_names(names).items()
    last, subject, text = sae_italian.open_sae(target, model, corpus)
    named = [*((short, sae_italian.load_sae(given)) for short, given in others), (name, last)]
    drawn = {"n_tokens": tokens, "context_size": context_size, "seed": seed, "n_contexts": sizes["contexts"]}
    root = causal_tree(subject, named, latent, text, branches=sizes["branches"], **drawn)
    return _written(out, "tree", plain(root), root.text(), {"tree": root.svg()})


# --- attribution graphs -----------------------------------------------------------------------------------------------


SETTINGS: dict[str, Any] = {"max_nodes": 4096, "batch": 0, "check": 0, "study": 0, "memory": 0.0} | dict.fromkeys(
    ("target", "against", "labels"), ""
)


def graph(
    model: str, transcoders: Path, prompt: str, /, *words: str, out: Path | None = None, overwrite: bool = False
) -> Result:
    """Draw which latents lead from a prompt to the next token: an exact graph of the model with its norms and patterns frozen.

    Args:
        model: Name, hub id or folder of the model.
        transcoders: Folder of a transcoder, or of several, one for each layer (a suite's).
        prompt: The text whose next token is explained; with study=N a case (agreement, attractor, participle, ioi) or a
            file with a prompt a line.
        words: max_nodes=N, latents that become nodes (default: 4096); batch=N, targets of a backward pass, at most 128
            (default: 0, 16 or more as prompt and model are small); target=TEXT, the token to explain (default: the
            likeliest that cover 95 %); against=TEXT, the token whose logit is taken from it (default: the mean of all);
            check=N, latents that are taken away in the real model, beside random transcoders (default: 0, none);
            memory=N, 10^9 bytes that edges may take (default: what is free);
            labels=FOLDER, with the transcoders' feature caches, whose contexts and explanations the page shows (default:
            none); study=N, graphs of so many prompts, with intervals over them, beside random transcoders, attribution
            patching and gold labels (default: 0, one graph).
        out: Folder for the page (index.html), graph.json, graph.npz, graph.svg and neuronpedia.json; a graph that was
            interrupted, or stopped by its minutes, goes on in it. Nothing is written without it.
        overwrite: Replace a graph of other settings in the folder. Default: no.
    """
    settings = key_values(words, SETTINGS)
    make = _study if settings["study"] else _graph
    if out is None:
        return make(model, transcoders, prompt, settings, None)
    spec = {"model": model, "transcoders": transcoders, "prompt": prompt, **settings}
    changeable = ("batch", "check", "memory", "labels")
    with claimed(out, "graph", spec, resume=True, overwrite=overwrite, changeable=changeable):
        return make(model, transcoders, prompt, settings, out)


def _study(model: str, transcoders: Path, case: str, settings: dict[str, Any], out: Path | None) -> Result:
    from sae_italian.circuits.study import study

    if given := [name for name in ("target", "against", "check", "labels") if settings[name]]:
        raise UsageError(f"{given[0]}= is for one graph, a study has its own. Leave one of the two out.")
    loaded, saes = _loaded(model, transcoders)
    sizes: dict[str, Any] = {name: settings[name] or None for name in ("max_nodes", "batch", "memory")}
    found = study(loaded, saes, case, settings["study"], **sizes)
    value, text = {**plain(found), "estimates": plain(found.estimates())}, found.text()
    if out is not None:
        write_json(out / "result.json", value)
        write_text(out / "graph.study.svg", found.svg())
        text += f"\n\n{out}/result.json, graph.study.svg"
    return Result(value, text)


def _graph(model: str, transcoders: Path, prompt: str, settings: dict[str, Any], out: Path | None) -> Result:
    from sae_italian.analysis.latent import token_of
    from sae_italian.browser.graph import latents_of, write_graph_page
    from sae_italian.circuits.check import check, check_svg
    from sae_italian.circuits.edges import attribute, layers_of
    from sae_italian.circuits.graph import scores
    from sae_italian.circuits.show import graph_svg, neuronpedia, summary

    loaded, saes = _loaded(model, transcoders)
    texts = settings["target"], settings["against"]
    wanted, against = (token_of(loaded.tokenizer, text) if text else None for text in texts)
    if against is not None and wanted is None:
        raise UsageError(f"against={settings['against']} needs target=TEXT, the token whose logit it is taken from.")
    how: dict[str, Any] = {"max_nodes": settings["max_nodes"], "batch": settings["batch"] or None, "resume": out}
    how |= {"logits": wanted if wanted is None else [wanted], "against": against, "memory": settings["memory"] or None}
    with one_of(2 if settings["check"] else 1):  # the random transcoders' graph takes as long
        found = attribute(loaded, saes, prompt, **how)
    value = {"prompt": prompt, "model": model, "n_active": found.n_active, **plain(scores(found))}
    where = out or Path(), loaded.tokenizer
    latents = latents_of(Path(settings["labels"]), saes, found, *where) if settings["labels"] else {}
    labels = {key: told["label_en"] for key, told in latents.items()}
    text, files = summary(found, labels), {"graph": graph_svg(found)} if out else {}
    if gap := sorted({*range(found.n_layers)} - {*layers_of(saes, loaded)}):
        text += f"\n\nNo transcoder of layer {', '.join(map(str, gap))}: all that its MLP writes is an error node at each token."
    checked = None
    if settings["check"]:
        checked = check(loaded, saes, found, n_latents=settings["check"])
        value["check"], files["graph.check"] = plain(checked), check_svg(checked)
        text += f"\n\n{checked.text()}"
    if out is not None:
        found.save(out)
        for name, drawn in files.items():
            write_text(out / f"{name}.svg", drawn)
        write_json(out / "neuronpedia.json", neuronpedia(found, prompt, labels))
        write_json(out / "result.json", value)
        write_graph_page(out, found, latents, checked)
        text += f"\n\n{out}/index.html, graph.json, graph.npz, graph.svg, neuronpedia.json, result.json"
    return Result(value, text)


def _loaded(name: str, transcoders: Path) -> tuple[Any, list[Any]]:
    """Return the model and the transcoders, and say where these were trained on another model, as a fine-tune's may be."""
    saes = list(map(sae_italian.load_sae, transcoder_folders(transcoders)))
    model = sae_italian.load_model(name)
    there = model.loaded_from["name"]
    own = {str(sae.cfg.metadata.model_name or there) for sae in saes}
    if other := [each for each in sorted(own) if Path(each).name != Path(there).name]:
        sys.stderr.write(f"The transcoders were trained on {other[0]!r}; the model here is {there!r}.\n")
    return model, saes


def transcoder_folders(folder: Path) -> list[Path]:
    """Return a transcoder's folder, or those of a suite's; SAEs of other sites beside them are left out."""
    if (folder / "cfg.json").exists():
        return [folder]
    configs = {path.parent: read_json(path) for path in sorted(folder.glob("*/cfg.json"))}
    kinds = {path: cfg.get("architecture") for path, cfg in configs.items() if isinstance(cfg, dict)}
    if not (mine := [path for path, kind in kinds.items() if "transcoder" in str(kind)]):
        raise UsageError(f"{folder} holds no transcoders. Train some with `sae-italian train mini/transcoders`.")
    return mine
