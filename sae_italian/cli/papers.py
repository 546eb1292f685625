"""The command of the papers: `reproduce`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from sae_italian.base.errors import UsageError
from sae_italian.base.report import table
from sae_italian.base.words import read_words
from sae_italian.cli.options import Folder, Model, Out, Result


def reproduce(
    paper: str,
    /,
    *words: str,
    model: Model = None,
    sae: str | None = None,
    corpus: str | None = None,
    text_column: str = "text",
    context_size: int | None = None,
    out: Out = None,
    folder: Folder = Folder(),
) -> Result:
    """Run a paper's whole evaluation on any model, with the paper's own figures beside ours; or compare baselines.

    `reproduce baselines SAE...` sets SAEs of one model beside PCA, ICA, random directions and neurons.

    Args:
        paper: cunningham-2023, llama-scope, clic-it-2025, or baselines.
        words: key=value of the paper's budget, such as train_tokens=100000 (sizes in tokens). For baselines: the SAEs,
            or one config that is trained with its key=value first; and fit_tokens, card_tokens, kinds=[pca, ica] ...
        sae: Evaluate this SAE (a folder, or release:sae_id) instead of training by the recipe, which is the default.
        corpus: Local file or folder, or catalogue name; default: that of the SAE, else micro-italiano for the mini model.
        text_column: Column that holds the text.
        context_size: Tokens of a window; default: that of the SAE, else 128.
        out: Folder to write to; default: reports/PAPER-MODEL, or baselines.
    """
    from sae_italian import papers

    text: dict[str, Any] = {"corpus": corpus, "text_column": text_column, "context_size": context_size}
    flags: dict[str, Any] = asdict(folder)
    if paper == "baselines":
        return _baselines(words, out or Path("baselines"), sae, flags, {"model": model, **text})
    if out is None:
        out = Path("reports") / f"{paper}-{Path(sae or model or papers.MINI).name.replace(':', '-')}"
    report = papers.reproduce(paper, out, *words, model=model, sae=sae, **text, **flags)
    rows = [[row[key].replace("|", "\\|") for key in ("what", "where", "paper", "ours")] for row in report["figures"]]
    figures = table("figure | in the paper | the paper's | ours", rows)
    return Result(report, f"{figures}\n\nReport: {out / 'report.html'}, {out / 'report.md'}")


def _baselines(
    words: tuple[str, ...], out: Path, sae: str | None, flags: dict[str, Any], read: dict[str, Any]
) -> Result:
    """Compare SAEs with their baselines."""
    from sae_italian.papers import Settings, compare_baselines
    from sae_italian.papers.baselines import baselines_markdown

    known = get_type_hints(Settings, include_extras=True)
    own = [word for word in words if word.partition("=")[0] in known]
    others = [word for word in words if word not in own]
    settings = Settings(**read_words(own, known))
    saes = _saes(others + ([sae] if sae else []), out, flags)
    result = compare_baselines(saes, out, settings=settings, **read, **flags)
    return Result(result, f"{baselines_markdown(result)}\nwritten: {out}")


def _saes(words: list[str], out: Path, flags: dict[str, Any]) -> list[str]:
    """Return the SAEs named, or those that the config named trains into `<out>-saes`."""
    from sae_italian.training import read_values, spec_from_dict, suite_from_dict, train, train_suite
    from sae_italian.training.config import SUITE_KEY

    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if not names:
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
        return [str(train(spec_from_dict(values), folder, **flags))]
    suite = suite_from_dict(values)
    if "TC" in suite.sites:
        raise UsageError("baselines decompose the activations of one hook; take site TC out of the suite: sites=[R].")
    return [str(path) for path in train_suite(suite, folder, **flags)]
