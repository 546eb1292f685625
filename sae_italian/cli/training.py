"""The commands that train, judge, examine and publish SAEs, and `quickstart`, which goes the whole way."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

import sae_italian
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.report import plain, shown
from sae_italian.base.statistics import Estimate
from sae_italian.base.storage import RUN_FILE, record_in, write_text
from sae_italian.cli import Count, Folder, Picture, Result, Sae, Source, Workers, own_words
from sae_italian.saes import model_of
from sae_italian.saes.loading import full_name

Sample = Annotated[int, Parameter(validator=Number(gte=256))]


def quickstart(
    config: str = "mini/topk",
    /,
    *words: str,
    out: Path = Path("quickstart"),
    tokens: Count = 300_000,
    n_latents: Count | None = None,
    folder: Folder = Folder(),
) -> Result:
    """Go the whole way on the embedded model: train, cache, explain, score, report.

    Args:
        config: A training config, of one SAE.
        words: Settings that replace the config's, as key=value; card_tokens=N: held-out tokens of the evaluation card,
            default 50,000.
        out: Output folder.
        tokens: Held-out tokens to cache.
        n_latents: Explain this many live latents, drawn at random; default: all.
    """
    from sae_italian.quickstart import CARD_TOKENS, table_of
    from sae_italian.quickstart import quickstart as run

    own, overrides = own_words(words, {"card_tokens": CARD_TOKENS})
    results = run(out, config, *overrides, cache_tokens=tokens, latents=n_latents, **own, **asdict(folder))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    return Result(results, f"\n{table_of(results)}\n\nReport: {results['report']}\nAll of it, in {out}: {size:.0f} MB")


def train(
    config: str,
    /,
    *words: str,
    out: Path | None = None,
    origin: Annotated[str | None, Parameter(name="--from")] = None,
    dry_run: bool = False,
    processes: Count | None = None,
    folder: Folder = Folder(),
    where: Workers = Workers(),
) -> Result | None:
    """Train one SAE, a transcoder, or a suite of them; the result loads with SAELens.

    Args:
        config: A YAML file, a recipe of `sae-italian recipes`, or the folder of an earlier run; a suite has `layers`.
        words: Settings that replace the config's, as key=value, e.g. sae.k=64 training_tokens=2_000_000.
        out: Output folder; default: runs/<config's name>, or the run's own folder.
        origin: Start from the weights of this SAE, a folder or release:sae_id; default: from new ones.
        dry_run: Check the settings and print groups, tokens, memory (10^9 bytes) and what stands out in the activations of a
            model that is here; train nothing.
        processes: Train one SAE by so many processes, here or, with --engine ray, on a cluster; default: one, or those that
            torchrun has started.
    """
    from sae_italian.training import read_values, spec_from_dict, suite_from_dict
    from sae_italian.training.config import SUITE_KEY
    from sae_italian.training.logging import sweep_folder
    from sae_italian.training.run import check_run, on_ray, on_this_machine
    from sae_italian.training.suite import plan

    values = read_values(config, *words)
    if origin is not None:
        values["from_pretrained_path"] = full_name(origin)
    suite = suite_from_dict(values) if SUITE_KEY in values else None
    if dry_run:
        groups = [{"SAE": spec_from_dict(values)}] if suite is None else suite.groups()
        check_run(next(iter(groups[0].values())))
        return Result(*plan(groups, None if suite is None else suite.memory_gb))
    earlier = Path(config) if (Path(config) / RUN_FILE).is_file() else None
    out = out or earlier or sweep_folder(Path("runs") / Path(config).name.removesuffix(".yaml"))
    if suite is None:
        spec = spec_from_dict(values)
        if (where.engine != "local" and not processes) or where.workers:
            raise UsageError("--workers is for suites, whose groups are independent; one SAE takes --processes.")
        launch: Any = sae_italian.train
        if where.engine == "ray":
            launch = partial(on_ray, n=processes or 1, address=where.address)
        elif (processes or 1) > 1:
            launch = partial(on_this_machine, n=processes or 1)
        launch(spec, out=out, **asdict(folder))
        if int(os.environ.get("RANK", "0")):
            return None
        return Result({"sae": str(out)}, f"SAE: {out}") if spec.seeds == 1 else _several_seeds(out)
    if processes:
        raise UsageError("--processes is for one SAE; the groups of a suite are independent and take --workers.")
    out = out.resolve()  # a worker may have another working directory
    gpus = any(spec.device.startswith("cuda") for spec in suite.members().values())
    how: Any = asdict(folder) | {"run_units": where.map(out, gpus=float(gpus))}
    saes = [str(each) for each in sae_italian.train_suite(suite, out, **how)]
    return Result({"suite": str(out), "saes": saes}, "\n".join(f"SAE: {each}" for each in saes))


def _several_seeds(out: Path) -> Result:
    from sae_italian.analysis.geometry import recurrence

    found = recurrence(out)
    return Result({"sae": str(out), "seeds": plain(found)}, f"{found.table()}\n\nSAE: {out}")


def evaluate(
    sae: Sae,
    /,
    *,
    tokens: Count | None = None,
    loss_tokens: Count | None = None,
    source: Source = Source(),
) -> Result:
    """Measure an SAE on held-out text: its evaluation card, kept in its folder.

    Args:
        tokens: Held-out tokens, special ones not counted; default: 100000, or all where there are fewer.
        loss_tokens: Measure losses and KL on the first so many tokens only; default: on all.
    """
    from sae_italian.evaluation.card import read_seeds

    loaded, model, corpus = source.load(sae)
    size: dict[str, Any] = {"n_tokens": tokens or 100_000, "at_most": tokens is None, "loss_tokens": loss_tokens}
    card = sae_italian.evaluate(loaded, model, corpus, name=sae, **size, **source.reading)
    failure = _unkept(partial(card.save, Path(sae)), sae) if Path(sae).is_dir() else None
    if (seeds := read_seeds(Path(sae))) is None:
        return Result(plain(card), card.markdown(), failure)
    share, n = Estimate(**seeds["share"]), len(seeds["seeds"])
    found = f"Latents found in {n} of {n} seeds: {shown(share, '.1%')}, of random directions {seeds['random']:.1%}."
    return Result({**plain(card), "seeds": seeds}, f"{card.markdown()}\n\n{found}", failure)


def _unkept(keep: Callable[[], object], where: object) -> UsageError | None:
    """Keep what was measured; return what to fail with, once it is printed, where that cannot be done."""
    try:
        keep()
    except OSError as error:
        return UsageError(f"{where} cannot be written to ({error.strerror or error}): what is printed is all there is.")


def doctor(sae: Sae, /, *, tokens: Sample = 8192, out: Picture = None, source: Source = Source()) -> Result:
    """Say whether an SAE fits its model and whether its training is healthy, and name what is wrong.

    Args:
        sae: The SAE: a folder (SAELens, sparsify or Llama Scope format), release:sae_id, a training that is going on, or
            a folder of transcoders, for all of them at once.
        tokens: Size of the sample, in tokens.
        out: File for the picture of a training's curves; default: curves.svg in its folder.
    """
    from sae_italian.evaluation.doctor import Diagnosis, examine, finding_of
    from sae_italian.training.curves import look_at_training
    from sae_italian.training.logging import WEIGHTS

    folder, picture, failure = Path(sae), None, None
    if not (folder / "cfg.json").is_file() and any(folder.glob("*TC*/cfg.json")):
        return _doctor_of_set(folder, tokens, source)
    trained_here = record_in(folder).get("kind") == "train"
    if trained_here and not (folder / WEIGHTS).is_file():
        report = Diagnosis(sae, "-", "-")
    else:
        try:
            loaded = sae_italian.load_sae(sae)
        except DataError as error:
            report = Diagnosis(sae, "-", "-", checks=[finding_of(error)])
        else:  # what is wrong with the text is no finding about the SAE
            model, corpus = model_of(loaded, source.model), source.corpus or _corpus_of(loaded, source.text_column)
            report = examine(loaded, model, corpus, n_tokens=tokens, name=sae, **source.reading)
    if trained_here:
        checks, svg = look_at_training(folder)
        report.checks += checks
        picture = out or folder / "curves.svg"
        failure = _unkept(partial(write_text, picture, svg), picture)
    if failed := [check.name for check in report.checks if check.status == "fail"]:
        failure = UsageError(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}.")
    value = {**plain(report), "status": report.status, "picture": picture}
    return Result(value, report.text() + (f"\ncurves: {picture}" if picture else ""), failure)


def _doctor_of_set(folder: Path, tokens: int, source: Source) -> Result:
    from sae_italian.circuits.check import examine_set
    from sae_italian.cli.causal import transcoder_folders

    saes = [sae_italian.load_sae(path) for path in transcoder_folders(folder)]
    corpus = source.corpus or _corpus_of(saes[0], source.text_column)
    found, text = examine_set(saes, model_of(saes[0], source.model), corpus, n_tokens=tokens, **source.reading)
    return Result({"set": str(folder), "corpus": corpus, **plain(found)}, text)


def _corpus_of(sae: Any, text_column: str) -> str:
    """Return the SAE's own corpus where it can be read here, else MicroItaliano, and say so."""
    from sae_italian.corpora.stream import MICRO_ITALIANO, check_corpus

    if named := sae.cfg.metadata.dataset_path:
        try:
            check_corpus(str(named), text_column=text_column)
            return str(named)
        except UsageError:
            if Path(str(named)).exists():
                raise
            sys.stderr.write(f"{named} is not here; the sample is {MICRO_ITALIANO}. Give --corpus for another.\n")
    return MICRO_ITALIANO


def publish(
    sae: Path,
    repository: str,
    /,
    *,
    id: str | None = None,
    licence: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Result:
    """Upload an SAE with its evaluation card, curves and model card to the Hugging Face hub.

    Args:
        sae: A training's folder with a card (`sae-italian evaluate SAE` makes it).
        repository: owner/name; made if it is not there.
        id: Folder in the repository; default: the name of the SAE's folder.
        licence: Of the weights, in the hub's word, e.g. apache-2.0; default: the model's.
        private: Make a new repository private.
        dry_run: Show files and sizes in bytes, send nothing.
    """
    from sae_italian.training.publish import publish as upload

    sent = upload(sae, repository, sae_id=id, licence=licence, private=private, dry_run=dry_run)
    return Result(sent._asdict() | {"url": f"https://huggingface.co/{repository}/tree/main/{sent.sae_id}"}, sent.text())
