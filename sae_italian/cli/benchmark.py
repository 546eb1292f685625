"""The command `benchmark`: SAEs on Italian tasks with their controls, and the leaderboard of what was scored before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from sae_italian.base.errors import UsageError
from sae_italian.cli.options import MINUTES, Folder, Model, Result, Seed, bounded, named, own_words, short_names

Many = Parameter(consume_multiple=True)
WORDS = MINUTES | {"tasks": "", "seeds": 5, "baselines": "", "wandb": ""}


@bounded
def benchmark(
    *saes: str,
    out: Path,
    preset: Literal["quick", "full"] = "quick",
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
        ud: Treebanks: CoNLL-U files or folders of them, or ISDT for the folder UD_Italian-ISDT; default: none.
        texts: Corpora of different genres as NAME=CORPUS, two or more; default: none.
    """
    from sae_italian.base.report import plain
    from sae_italian.benchmark import pages
    from sae_italian.benchmark.board import read_entries

    settings, names = own_words(saes, WORDS)
    if not names:
        boards = pages.leaderboard(out)
        text = "\n\n".join(board.markdown() for board in boards)
        return Result([plain(board) for board in boards], f"{text}\n\nleaderboard: {out / 'leaderboard.html'}")
    told = _run(short_names(names), out, preset, ud or [], named("--texts", texts), model, seed, folder, settings)
    entries = read_entries(out)
    board = pages.write(out, entries, told)
    sent = [pages.send_to_wandb(entries, settings["wandb"], out)] if settings["wandb"] else []
    value = {"folder": str(out), **plain(board), "refused": told["refused"]}
    return Result(value, "\n\n".join([board.markdown(), *sent, f"report: {out / 'benchmark.html'}"]))


def _run(
    names: dict[str, str],
    out: Path,
    preset: str,
    ud: list[str],
    texts: dict[str, str],
    model: str | None,
    seed: int,
    folder: Folder,
    settings: dict[str, Any],
) -> dict[str, Any]:
    import sae_italian
    from sae_italian.benchmark.material import gather
    from sae_italian.benchmark.run import benchmark as run
    from sae_italian.benchmark.tasks import all_tasks, chosen
    from sae_italian.saes import model_of

    if settings["seeds"] < 1:
        raise UsageError(f"seeds is {settings['seeds']}; 1 or more was expected.")
    tasks = chosen(all_tasks({"genre": texts}), preset, settings["tasks"])
    material = gather(ud, texts, seed, {task.source for task in tasks})
    saes = {name: sae_italian.load_sae(given) for name, given in names.items()}
    subject = model_of(next(iter(saes.values())), model)
    kinds = [kind for kind in settings["baselines"].split(",") if kind]
    how: dict[str, Any] = {"quick": preset == "quick" and not settings["tasks"], "n_seeds": settings["seeds"]}
    how |= {"resume": folder.resume, "overwrite": folder.overwrite}
    return run(saes, subject, material, tasks, out, baselines=_baselines(kinds) if kinds else None, **how)


def _baselines(kinds: list[str]) -> Any:
    """Return what fits baselines of these kinds, each with top-k at the SAE's own L0; `twin` is the random twin as a row."""
    from sae_italian.saes.baselines import TOPK, fit_baselines, random_twin

    def fit(sae: Any, sample: Any) -> dict[str, Any]:
        found = fit_baselines(sample, sae, [kind for kind in kinds if kind != "twin"]) if set(kinds) - {"twin"} else {}
        kept = {name: each for name, each in found.items() if name.endswith(TOPK)}
        return kept | ({"random twin": random_twin(sae, 0, lambda: sample)} if "twin" in kinds else {})

    return fit
