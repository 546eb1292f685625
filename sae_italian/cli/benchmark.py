"""The commands `benchmark`, with its leaderboard, `choose-k` and `absorption`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

import sae_italian
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain
from sae_italian.cli.options import MINUTES, Folder, Model, Result, Seed, bounded, named, own_words, short_names

Many = Parameter(consume_multiple=True)
WORDS = MINUTES | {"tasks": "", "seeds": 5, "baselines": "", "wandb": ""}


@bounded
def benchmark(
    *saes: str,
    out: Path,
    preset: Literal["quick", "full"] = "quick",
    sets: Literal["offline", "hub"] = "offline",
    ud: Annotated[list[str] | None, Many] = None,
    texts: Annotated[list[str] | None, Many] = None,
    model: Model = None,
    seed: Seed = 0,
    folder: Folder = Folder(),
) -> Result:
    """Score SAEs of one model on Italian tasks, with what form, the activations and a random twin reach beside them.

    Without an SAE, the leaderboard of all results below --out is written.

    Args:
        saes: SAEs' folders, or release:sae_id, all of one model; then words:
            minutes=N, after which it ends with what it has (default: no bound);
            tasks=ID,ID instead of a preset (default: the preset's); seeds=N, draws of the protocol (default: 5);
            baselines=pca,identity,random, fitted at the SAEs' hook (default: none); wandb=PROJECT (default: none).
        out: Folder for benchmark.md, .html, .json and saebench/; a further SAE joins it with --resume.
        preset: quick: 12 tasks where form does not give the answer, those that need --ud among them; full: all tasks.
        sets: Tasks that need no network, or those of 16 Italian sets of the hub.
        ud: Treebanks: CoNLL-U files or folders of them, or ISDT for the folder UD_Italian-ISDT; default: none.
        texts: Corpora of different genres as NAME=CORPUS, two or more; default: none.
    """
    from sae_italian.benchmark import pages
    from sae_italian.benchmark.board import read_entries

    settings, names = own_words(saes, WORDS)
    if not names:
        boards = pages.leaderboard(out)
        text = "\n\n".join(board.markdown() for board in boards)
        return Result([plain(board) for board in boards], f"{text}\n\nleaderboard: {out / 'leaderboard.html'}")
    where = (ud or [], named("--texts", texts), seed) if sets == "offline" else None
    told = _run(short_names(names), out, preset, where, model, folder, settings)
    entries = read_entries(out)
    board = pages.write(out, entries, told)
    sent = [pages.send_to_wandb(entries, settings["wandb"], out)] if settings["wandb"] else []
    value = {"folder": str(out), **plain(board), "refused": told["refused"]}
    return Result(value, "\n\n".join([board.markdown(), *sent, f"report: {out / 'benchmark.html'}"]))


def _run(
    names: dict[str, str],
    out: Path,
    preset: str,
    where: tuple[list[str], dict[str, str], int] | None,
    model: str | None,
    folder: Folder,
    settings: dict[str, Any],
) -> dict[str, Any]:
    from sae_italian.benchmark.hub import gather_hub, hub_tasks
    from sae_italian.benchmark.material import gather
    from sae_italian.benchmark.run import benchmark as run
    from sae_italian.benchmark.tasks import all_tasks, chosen
    from sae_italian.saes import model_of

    if settings["seeds"] < 1:
        raise UsageError(f"seeds is {settings['seeds']}; 1 or more was expected.")
    known = all_tasks({"genre": where[1]}) if where else hub_tasks()
    tasks = chosen(known, preset if where else "full", settings["tasks"])
    sources = list(dict.fromkeys(task.source for task in tasks))
    material, failed = (gather(*where, sources), []) if where else gather_hub(sources)
    saes = {name: sae_italian.load_sae(given) for name, given in names.items()}
    subject = model_of(next(iter(saes.values())), model)
    kinds = [kind for kind in settings["baselines"].split(",") if kind]
    how: dict[str, Any] = {"quick": preset == "quick", "n_seeds": settings["seeds"]}
    how |= {"resume": folder.resume, "overwrite": folder.overwrite}
    told = run(saes, subject, material, tasks, out, baselines=_baselines(kinds) if kinds else None, **how)
    return told | {"refused": [*told["refused"], *failed]}


def _baselines(kinds: list[str]) -> Any:
    """Return what fits baselines of these kinds, each with top-k at the SAE's own L0; `twin` is the random twin as a row."""
    from sae_italian.saes.baselines import TOPK, fit_baselines, random_twin

    def fit(sae: Any, sample: Any) -> dict[str, Any]:
        found = fit_baselines(sample, sae, [kind for kind in kinds if kind != "twin"]) if set(kinds) - {"twin"} else {}
        kept = {name: each for name, each in found.items() if name.endswith(TOPK)}
        return kept | ({"random twin": random_twin(sae, 0, lambda: sample)} if "twin" in kinds else {})

    return fit


def choose_k(
    config: str,
    /,
    *words: str,
    grid: str = "8,16,32,64,128",
    out: Path | None = None,
    folder: Folder = Folder(),
) -> Result:
    """Train short runs over a grid of k and some seeds on one pass, and recommend a k, or say that none was found.

    Args:
        config: A training config, of one SAE with a k.
        words: seeds=N, from the config's seed on (default: 3); share=X, of the config's training_tokens (default: 0.25);
            card_tokens=N, held-out tokens that judge (default: 20000); the others replace the config's, as key=value.
        grid: Values of k, three or more, with commas between them: latents per token.
        out: Output folder; default: runs/choose-k-<config's name>.
    """
    from sae_italian.benchmark.choose_k import choose_k as choose
    from sae_italian.training import load_spec

    own, others = own_words(words, {"seeds": 3, "share": 0.25, "card_tokens": 20_000})
    try:
        values = [int(k) for k in grid.split(",")]
    except ValueError as error:
        raise UsageError(f"--grid is {grid!r:.80}; numbers were expected, as in 8,16,32.") from error
    out = out or Path("runs") / f"choose-k-{Path(config).name.removesuffix('.yaml')}"
    own["n_tokens"] = own.pop("card_tokens")
    found = choose(load_spec(config, *others), out, values, **own, **asdict(folder))
    return Result({"out": str(out), **plain(found)}, f"{found.table()}\n\nPicture: {out}/choose-k.svg")


@bounded
def absorption(
    *saes: str, ud: Annotated[list[str] | None, Many] = None, out: Path | None = None, overwrite: bool = False
) -> Result:
    """Say how much of a class of words (gender, part of speech) is absorbed by latents of its members, with intervals.

    Args:
        saes: SAEs of one hook, each a folder or release:sae_id; the others are compared with the first, pair by pair.
            minutes=N: end then, with what there is (default: no bound).
        ud: Treebanks whose words are the classes: CoNLL-U files or folders; default: micro-italiano.
        out: Folder for absorption.json and absorption.md; default: nothing is written.
        overwrite: Replace an earlier result in the folder. Default: no.
    """
    from sae_italian.base.storage import claimed
    from sae_italian.benchmark.absorption import absorption as absorbed
    from sae_italian.saes import model_of

    given = short_names(own_words(saes, MINUTES)[1])
    if not given:
        raise UsageError("no SAE was given; give one, or several of one hook.")
    loaded = {name: sae_italian.load_sae(sae) for name, sae in given.items()}
    hooks = {name: sae.cfg.metadata.hook_name for name, sae in loaded.items()}
    if len(set(hooks.values())) > 1:
        raise UsageError(f"the SAEs read at different hooks ({', '.join(hooks.values())}). Give SAEs of one hook.")
    model = model_of(next(iter(loaded.values())), None)
    spec = {"saes": given, "ud": ud}
    with claimed(out, "absorption", spec, overwrite=overwrite) if out else nullcontext():  # refused before the work
        found = absorbed(loaded, model, ud or ["micro-italiano"])
        if out is not None:
            found.save(out)
    return Result({**plain(found), "out": out and str(out)}, found.table())
