"""The commands of benchmarks: ours, with its leaderboard, `choose-k` and `absorption`; the papers'; ExplainITA (EVALITA 2026)."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter
from pydantic import PositiveInt

import sae_italian
from sae_italian import benchmark as bench
from sae_italian.autointerp.explainita import check_format, read_split, write_submission
from sae_italian.autointerp.explainita_tasks import DEFAULT_MODEL, evaluate_explanations, evaluate_sequences, replay
from sae_italian.autointerp.explainita_tasks import predict as answer
from sae_italian.autointerp.llm import LLMOptions
from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge
from sae_italian.autointerp.llm.calls import DryClient
from sae_italian.base.errors import UsageError, check_known
from sae_italian.base.labels import read_words
from sae_italian.base.pace import is_bounded
from sae_italian.base.report import plain, table
from sae_italian.base.storage import claimed
from sae_italian.benchmark.absorption import absorption as absorbed
from sae_italian.cli import Folder, Many, Model, Result, Seed, Source, named, numbers, own_words, short_names
from sae_italian.corpora.stream import check_corpus
from sae_italian.saes import model_of
from sae_italian.saes.baselines import KINDS, TOPK, fit_baselines, random_twin

WORDS = {"tasks": "", "seeds": 5, "baselines": "", "wandb": ""}
Task = Annotated[Literal[1, 2], Parameter(help="The task: 1 explanations, 2 sequences.")]


def benchmark(
    *saes: str,
    out: Path,
    preset: Literal["quick", "full"] = "quick",
    sets: Literal["offline", "hub"] = "offline",
    ud: Many = None,
    texts: Many = None,
    model: Model = None,
    seed: Seed = 0,
    folder: Folder = Folder(),
) -> Result:
    """Score SAEs of one model on Italian tasks, with what form, the activations and a random twin reach beside them.

    Without an SAE, the leaderboard of all results below --out is written.

    Args:
        saes: SAEs' folders, or release:sae_id, all of one model; then words:
            tasks=ID,ID instead of a preset (default: the preset's); seeds=N, draws of the protocol (default: 5);
            baselines=KIND,KIND (pca, ica, nmf, random, identity, twin; default: none); wandb=PROJECT (default: none).
        out: Folder for benchmark.md, .html, .json and saebench/; a further SAE joins it with --resume.
        preset: quick: 12 tasks where form does not give the answer, those that need --ud among them; full: all tasks.
        sets: Tasks that need no network, or those of 16 Italian sets of the hub.
        ud: Treebanks: CoNLL-U files or folders of them, or ISDT for the folder UD_Italian-ISDT; default: none.
        texts: Corpora of different genres as NAME=CORPUS, two or more; default: none.
    """
    settings, names = own_words(saes, WORDS)
    if not names:
        boards = bench.leaderboard(out)
        text = "\n\n".join(board.markdown() for board in boards)
        return Result([plain(board) for board in boards], f"{text}\n\nleaderboard: {out / 'leaderboard.html'}")
    check_known("baseline", (*KINDS, "twin"), *(kinds := [kind for kind in settings["baselines"].split(",") if kind]))
    given, genres, offline = short_names(names), named("--texts", texts), sets == "offline"
    for corpus in genres.values():  # also of tasks that are not asked
        check_corpus(corpus)
    known = bench.all_tasks({"genre": genres}) if offline else bench.hub_tasks()
    tasks = bench.chosen(known, preset if offline else "full", settings["tasks"])
    sources = list(dict.fromkeys(task.source for task in tasks))
    material, failed = (bench.gather(ud or [], genres, seed, sources), []) if offline else bench.gather_hub(sources)
    loaded = {name: sae_italian.load_sae(sae) for name, sae in given.items()}
    subject = model_of(next(iter(loaded.values())), model)
    how = {"quick": preset == "quick", "n_seeds": settings["seeds"], **asdict(folder)}
    told = bench.benchmark(loaded, subject, material, tasks, out, baselines=partial(_fitted, kinds), **how)
    told["refused"] = [*told["refused"], *failed]
    entries = bench.read_entries(out)
    board = bench.write(out, entries, told)
    sent = [bench.send_to_wandb(entries, settings["wandb"], out)] if settings["wandb"] else []
    value = {"folder": str(out), **plain(board), "refused": told["refused"]}
    return Result(value, "\n\n".join([board.markdown(), *sent, f"report: {out / 'benchmark.html'}"]))


def _fitted(kinds: list[str], sae: Any, sample: Any) -> dict[str, Any]:
    """Return baselines of these kinds, each with top-k at the SAE's own L0; `twin` is the random twin as a row."""
    own = [kind for kind in kinds if kind != "twin"]
    found = fit_baselines(sample, sae, own) if own else {}
    kept = {name: each for name, each in found.items() if name.endswith(TOPK)}
    return kept | ({"random twin": random_twin(sae, 0, lambda: sample)} if "twin" in kinds else {})


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
    out = out or Path("runs") / f"choose-k-{Path(config).name.removesuffix('.yaml')}"
    own["n_tokens"] = own.pop("card_tokens")
    found = choose(load_spec(config, *others), out, numbers("--grid", grid), **own, **asdict(folder))
    return Result({"out": str(out), **plain(found)}, f"{found.table()}\n\nPicture: {out}/choose-k.svg")


def absorption(*saes: str, ud: Many = None, out: Path | None = None, overwrite: bool = False) -> Result:
    """Say how much of a class of words (gender, part of speech) is absorbed by latents of its members, with intervals.

    Args:
        saes: SAEs of one hook, each a folder or release:sae_id; the others are compared with the first, pair by pair.
        ud: Treebanks whose words are the classes: CoNLL-U files or folders; default: micro-italiano.
        out: Folder for absorption.json and absorption.md; default: nothing is written.
        overwrite: Replace an earlier result in the folder. Default: no.
    """
    given = short_names(saes)
    loaded = {name: sae_italian.load_sae(sae) for name, sae in given.items()}
    hooks = {name: sae.cfg.metadata.hook_name for name, sae in loaded.items()}
    if len(set(hooks.values())) > 1:
        raise UsageError(f"the SAEs read at different hooks ({', '.join(hooks.values())}). Give SAEs of one hook.")
    model = model_of(next(iter(loaded.values())), None)
    spec = {"saes": given, "ud": ud}  # another folder is refused before the work
    with claimed(out, "absorption", spec, resume=True, overwrite=overwrite) if out else nullcontext():
        found = absorbed(loaded, model, ud or ["micro-italiano"])
        if out is not None:
            found.save(out)
    return Result({**plain(found), "out": out and str(out)}, found.table())


# --- papers -----------------------------------------------------------------------------------------------------------


def reproduce(
    paper: str,
    /,
    *words: str,
    sae: str | None = None,
    out: Path | None = None,
    source: Source = Source(),
    folder: Folder = Folder(),
) -> Result:
    """Run a paper's whole evaluation on any model, with the paper's own figures beside ours; or compare baselines.

    `reproduce baselines SAE...` sets SAEs of one model beside PCA, ICA, random directions and neurons.

    Args:
        paper: cunningham-2023, llama-scope, clic-it-2025, or baselines.
        words: key=value of the paper's budget, such as train_tokens=100000 (sizes in tokens). For baselines: the SAEs, or one
            config that is trained with its key=value first; and fit_tokens, card_tokens, kinds=[pca, ica] ...
        sae: Evaluate this SAE (a folder, or release:sae_id) instead of training by the recipe, which is the default.
        out: Folder to write to; default: reports/PAPER-MODEL, or baselines.
    """
    from sae_italian import papers

    text, flags = asdict(source), asdict(folder)
    if paper == "baselines" and is_bounded():
        raise UsageError("minutes= would compare SAEs on unequal text; leave it out.")
    if paper == "baselines":
        return _baselines(words, out or Path("baselines"), sae, flags, text)
    if out is None:
        out = Path("reports") / f"{paper}-{Path(sae or source.model or papers.MINI).name.replace(':', '-')}"
    report = papers.reproduce(paper, out, *words, sae=sae, **text, **flags)
    rows = [[row[key] for key in ("what", "where", "paper", "ours")] for row in report["figures"]]
    figures = table("figure | in the paper | the paper's | ours", rows)
    return Result(report, f"{figures}\n\nReport: {out / 'report.html'}, {out / 'report.md'}")


def _baselines(
    words: tuple[str, ...], out: Path, sae: str | None, flags: dict[str, Any], read: dict[str, Any]
) -> Result:
    """Compare SAEs with their baselines."""
    from sae_italian.papers import Settings, compare_baselines
    from sae_italian.papers.measure import baselines_markdown

    known = get_type_hints(Settings, include_extras=True)
    own = [word for word in words if word.partition("=")[0] in known]
    others = [word for word in words if word not in own]
    settings = Settings(**read_words(own, known))
    saes = _saes(others + ([sae] if sae else []), out, flags)
    result = compare_baselines(saes, out, settings=settings, **read, **flags)
    return Result(result, f"{baselines_markdown(result)}\nwritten: {out}")


def _saes(words: list[str], out: Path, flags: dict[str, Any]) -> list[str]:
    """Return the SAEs named, or those that the config named trains into `<out>-saes`."""
    from sae_italian.training import read_values, suite_from_dict, train, train_suite
    from sae_italian.training.config import SUITE_KEY

    overrides = [word for word in words if "=" in word]
    if not (names := [word for word in words if "=" not in word]):
        raise UsageError("which SAEs? Give folders or release:sae_id, or one config to train.")
    if not any(name.endswith(".yaml") or name.startswith(("mini/", "configs/")) for name in names):
        if overrides:
            raise UsageError(f"{overrides[0]} sets a config's key, but SAEs were given, not a config.")
        return names
    if len(names) > 1:
        raise UsageError(f"give one config, or SAEs; found {', '.join(names)}.")
    values = read_values(names[0], *overrides)
    folder = out.with_name(f"{out.name}-saes")
    if SUITE_KEY not in values:
        return [str(train(values, folder, **flags))]
    if "TC" in (suite := suite_from_dict(values)).sites:
        raise UsageError("baselines decompose the activations of one hook; take site TC out of the suite: sites=[R].")
    return [str(path) for path in train_suite(suite, folder, **flags)]


# --- ExplainITA -------------------------------------------------------------------------------------------------------


def evaluate(
    submission: str,
    gold: str,
    /,
    *,
    task: Task,
    split: str = "test",
    bert: str | None = None,
    layer: int | None = None,
) -> Any:
    """Score a submission file against the gold file.

    Args:
        submission: A .jsonl or .parquet file, or a folder of splits.
        gold: A file or folder of the same layout, or the hub's data set.
        split: Split of a folder that is read.
        bert: BERTScore's model, a name or a folder; default: multilingual BERT.
        layer: Layer of that model that is compared; default: bert-score's own choice.
    """
    predicted, truth = read_split(submission, task, split), read_split(gold, task, split)
    if task == 1:
        return evaluate_explanations(predicted, truth, model=bert or DEFAULT_MODEL, layer=layer)
    return evaluate_sequences(predicted, truth)


def predict(
    data: str,
    out: Path | None = None,
    /,
    *words: str,
    task: Task,
    split: str | None = None,
    sae: str | None = None,
    model: Model = None,
    llm: Annotated[LLMOptions | None, Parameter(name="*")] = None,
) -> Any:
    """Write a submission file: by rule and by word, or with an LLM. With --sae: replay the data and compare.

    Args:
        data: A file or folder, or the hub's data set.
        out: The submission, .jsonl or .parquet; none is needed with --sae.
        words: Rare settings of the language model, key=value; with --sae n_latents=N: only the first N.
        split: Split of the data's folder; default: test, with --sae train_gold.
        sae: Play the tokens through this SAE (a folder, or release:sae_id) and say whether the data is its own; default: predict.
    """
    if sae is not None:  # nothing is written: what stands in the file's place is a setting
        limit = read_words(words if out is None else (str(out), *words), {"n_latents": PositiveInt}).get("n_latents")
        latents = read_split(data, task, split or "train_gold")[:limit]
        loaded, subject, _ = sae_italian.open_sae(sae, model, "none")
        return replay(latents, loaded, subject)
    if out is None or out.resolve() == Path(data).resolve():
        raise UsageError("a submission needs a file of its own to be written to, such as run1.jsonl.")
    check_format(out)
    settings = (llm or LLMOptions()).with_words(words)
    latents = read_split(data, task, split or "test")
    result: dict[str, Any] = {"task": task, "latents": len(latents), "out": str(out)}
    if not settings.wants_llm:
        answers, _ = _predicted(latents, task, settings, None)
        result["by"] = "rules on the examples" if task == 1 else "words of the explanation"
    elif settings.estimate:
        dry = DryClient(settings)
        _predicted(latents, task, settings, dry)
        return dry.estimate(len(latents), len(latents))
    else:
        from sae_italian.autointerp.llm.client import Client

        ledger = out.with_suffix(".calls.sqlite")
        with Client(settings, ledger) as client:
            answers, unanswered = _predicted(latents, task, settings, client)
        client.must_have_answered()
        result |= {"by": f"llm:{settings.llm_model}", "unanswered": unanswered, "calls": client.counts}
        result |= {"why": client.told()[1:], "ledger": str(ledger)}
    write_submission(data, out, task, answers, split or "test")
    return result


def _predicted(latents: Any, task: Task, settings: Any, client: Any) -> Any:
    """Return the answers to a task, those of a client's model where there is one."""
    asked = (LLMExplainer(client), LLMJudge(client)) if client else (None, None)
    return answer(latents, task, explainer=asked[0], judge=asked[1], language=settings.language)
