"""The commands that train, judge, examine and publish SAEs, and `quickstart`, which goes the whole way."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import RUN_FILE, write_text
from sae_italian.cli.options import Count, Folder, Result, Source, Workers, own_words


def quickstart(
    config: str = "mini/topk",
    /,
    *words: str,
    out: Path = Path("quickstart"),
    tokens: Count = 300_000,
    n_latents: Count | None = None,
    folder: Annotated[Folder, Parameter(name="*")] = Folder(),  # noqa: B008
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

    card, overrides = own_words(words, {"card_tokens": CARD_TOKENS})
    results = run(out, config, *overrides, cache_tokens=tokens, latents=n_latents, **card, **asdict(folder))
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    return Result(results, f"\n{table_of(results)}\n\nReport: {results['report']}\nAll of it, in {out}: {size:.0f} MB")


def train(
    config: str,
    /,
    *words: str,
    out: Path | None = None,
    dry_run: bool = False,
    folder: Annotated[Folder, Parameter(name="*")] = Folder(),  # noqa: B008
    where: Annotated[Workers, Parameter(name="*")] = Workers(),  # noqa: B008
) -> Result:
    """Train one SAE, a transcoder, or a suite of them; the result loads with SAELens.

    Args:
        config: A YAML file, a recipe of `sae-italian recipes`, or the folder of an earlier run; a suite has `layers`.
        words: Settings that replace the config's, as key=value, e.g. sae.k=64 training_tokens=2_000_000.
        out: Output folder; default: runs/<config's name>, or the run's own folder.
        dry_run: Check the settings and print groups, tokens, memory (10^9 bytes) and what stands out in the activations of a
            model that is here; train nothing.
    """
    from sae_italian.training import read_values, spec_from_dict, suite_from_dict, train_suite
    from sae_italian.training import train as train_sae
    from sae_italian.training.config import SUITE_KEY
    from sae_italian.training.logging import sweep_folder

    values = read_values(config, *words)
    suite = suite_from_dict(values) if SUITE_KEY in values else None
    if dry_run:
        from sae_italian.training.memory import plan
        from sae_italian.training.run import check_run

        groups = [{"SAE": spec_from_dict(values)}] if suite is None else suite.groups()
        check_run(next(iter(groups[0].values())))
        return Result(*plan(groups, None if suite is None else suite.memory_gb))
    earlier = Path(config) if (Path(config) / RUN_FILE).is_file() else None
    out = out or earlier or sweep_folder(Path("runs") / Path(config).name.removesuffix(".yaml"))
    flags = asdict(folder)
    if suite is None:
        if where.engine != "local" or where.workers:
            raise UsageError("--engine and --workers are for suites, whose groups are independent; this is one SAE.")
        train_sae(spec_from_dict(values), out, **flags)
        return Result({"sae": str(out)}, f"SAE: {out}")
    out = out.resolve()  # a worker may have another working directory
    elsewhere = where.engine != "local" or (where.workers or 1) > 1
    run_units: dict[str, Any] = {"run_units": where.map(out, gpus=float(suite.on_gpu))} if elsewhere else {}
    folders = train_suite(suite, out, **flags, **run_units)
    return Result(
        {"suite": str(out), "saes": [str(each) for each in folders]}, "\n".join(f"SAE: {each}" for each in folders)
    )


def recipes() -> Result:
    """List the training configs that come with the package."""
    from sae_italian.training import recipes as shipped

    known = shipped()
    return Result(known, "\n".join(f"{name:34} {line}" for name, line in known.items()))


def evaluate(
    sae: str,
    /,
    *,
    tokens: Count = 100_000,
    loss_tokens: Count | None = None,
    source: Annotated[Source, Parameter(name="*")] = Source(),  # noqa: B008
) -> Result:
    """Measure an SAE on held-out text: its evaluation card, kept in its folder.

    Args:
        sae: The SAE: a folder, or release:sae_id.
        tokens: Held-out tokens, special ones not counted.
        loss_tokens: Measure losses and KL on the first so many tokens only; default: on all.
    """
    from sae_italian.base.report import plain
    from sae_italian.evaluation import evaluate as measure

    loaded, model, corpus = source.load(sae)
    size = {"n_tokens": tokens, "loss_tokens": loss_tokens}
    card = measure(loaded, model, corpus, name=sae, **size, **source.reading)
    if Path(sae).is_dir():
        card.save(Path(sae))
    return Result(plain(card), card.markdown())


def doctor(
    sae: str,
    /,
    *,
    tokens: int = 8192,
    out: Path | None = None,
    source: Annotated[Source, Parameter(name="*")] = Source(),  # noqa: B008
) -> Result:
    """Say whether an SAE fits its model and whether its training is healthy, and name what is wrong.

    Args:
        sae: The SAE: a folder (SAELens, sparsify or Llama Scope format), release:sae_id, or a training that is going on.
        tokens: Size of the sample, in tokens.
        out: File for the picture of a training's curves; default: curves.svg in its folder.
    """
    from sae_italian.base.report import plain
    from sae_italian.evaluation.doctor import Diagnosis, unreadable
    from sae_italian.saes import load_sae
    from sae_italian.training.curves import look_at_training
    from sae_italian.training.run import WEIGHTS, read_run

    if tokens < 256:
        raise UsageError(f"--tokens is {tokens}; the doctor needs 256 or more.")
    folder, picture = Path(sae), None
    trained_here = read_run(folder).get("kind") == "train"
    if trained_here and not (folder / WEIGHTS).is_file():
        report = Diagnosis(sae, "-", "-")
    else:
        try:
            report = _examine(sae, load_sae(sae), tokens, source)
        except DataError as error:
            report = unreadable(sae, error)
    if trained_here:
        checks, svg = look_at_training(folder)
        report.checks += checks
        picture = out or folder / "curves.svg"
        write_text(picture, svg)
    failed = [check.name for check in report.checks if check.status == "fail"]
    failure = UsageError(f"{len(failed)} of {len(report.checks)} checks failed: {', '.join(failed)}.")
    text = report.text() + (f"\ncurves: {picture}" if picture else "")
    return Result({**plain(report), "status": report.status, "picture": picture}, text, failure if failed else None)


def _examine(name: str, sae: Any, n_tokens: int, source: Source) -> Any:
    from sae_italian.evaluation.doctor import examine
    from sae_italian.saes.loading import model_of

    model = model_of(sae, source.model)
    corpus = source.corpus or _corpus_of(sae, source.text_column)
    return examine(sae, model, corpus, n_tokens=n_tokens, name=name, **source.reading)


def _corpus_of(sae: Any, text_column: str) -> str:
    """Return the SAE's own corpus where it can be read here, else MicroItaliano, and say so."""
    from sae_italian.corpora.stream import MICRO_ITALIANO, check_corpus

    named = sae.cfg.metadata.dataset_path
    if named:
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
