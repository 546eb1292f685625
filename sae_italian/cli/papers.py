"""The commands of the papers: `reproduce` and `baselines`."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_italian.base.errors import UsageError
from sae_italian.cli.base import Commands, Result, folder_options, positive

KINDS = ("pca", "ica", "random", "identity")
# those of papers.Settings, which is not imported before a command runs
SIZES = {
    "fit_tokens": (200_000, "training tokens that baselines are fitted on"),
    "ica_tokens": (20_000, "of these, tokens for ICA"),
    "card_tokens": (20_000, "held-out tokens for explained variance and perplexity"),
    "cache_tokens": (60_000, "held-out tokens for explanations and simulations"),
    "latents": (100, "latents scored in each dictionary"),
}


def add_commands(root: Commands) -> None:
    text = "a paper's whole evaluation on any model, with the paper's own figures beside ours"
    sub = root.add("reproduce", _reproduce, text)
    sub.add_argument("paper", help="cunningham-2023, llama-scope or clic-it-2025")
    sub.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the paper's budget, e.g. train_tokens=100000"
    )
    sub.add_argument("--model", help="default: that of --sae, else sae-italian-mini")
    sub.add_argument("--sae", help="evaluate this SAE (a folder, or release:sae_id) instead of training by the recipe")
    sub.add_argument("--corpus", help="default: that of --sae, else micro-italiano for the embedded model")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--context-size", type=int, help="default: that of --sae, else 128")
    sub.add_argument("--out", type=Path, help="output folder (default: reports/PAPER-MODEL)")
    folder_options(sub)

    text = "an SAE beside PCA, ICA, random directions and neurons: autointerp, explained variance, perplexity by layer"
    sub = root.add("baselines", _baselines, text)
    sub.add_argument(
        "saes", nargs="+", metavar="SAE|CONFIG", help="SAEs of one model, or one config and key=value: trained"
    )
    sub.add_argument("--out", type=Path, default=Path("baselines"), help="output folder (default: baselines)")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--corpus", help="default: the corpus the SAE was trained on")
    sub.add_argument("--text-column", default="text")
    sub.add_argument("--context-size", type=int, help="default: the context the SAE was trained with")
    sub.add_argument("--kinds", nargs="+", default=KINDS, help="of pca, ica, nmf, random, identity")
    for field, (default, help_) in SIZES.items():
        sub.add_argument(f"--{field.replace('_', '-')}", type=int, default=default, help=f"{help_} ({default:,})")
    sub.add_argument("--seed", type=int, default=0)
    folder_options(sub)


def _reproduce(options: argparse.Namespace) -> Result:
    from sae_italian.papers import reproduce
    from sae_italian.papers.document import Table, markdown_table
    from sae_italian.papers.subject import MINI, folder_name

    out = options.out or Path("reports") / f"{options.paper}-{folder_name(options.sae or options.model or MINI)}"
    report = reproduce(
        options.paper,
        out,
        *options.overrides,
        model=options.model,
        sae=options.sae,
        corpus=options.corpus,
        text_column=options.text_column,
        context_size=options.context_size,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    rows = [(row["what"], row["where"], row["paper"], row["ours"]) for row in report["figures"]]
    lines = markdown_table(Table("", ("figure", "in the paper", "the paper's", "ours"), rows))
    return report, "\n".join([*lines, "", f"Report: {out / 'report.html'}, {out / 'report.md'}"])


def _baselines(options: argparse.Namespace) -> Result:
    from sae_italian.papers import Settings, compare_baselines
    from sae_italian.papers.tables import baselines_markdown

    sizes = {field: getattr(options, field) for field in SIZES}
    for field, size in sizes.items():
        positive(f"--{field.replace('_', '-')}", size)
    settings = Settings(kinds=tuple(options.kinds), seed=options.seed, **sizes)
    result = compare_baselines(
        _saes(options),
        options.out,
        model=options.model,
        corpus=options.corpus,
        text_column=options.text_column,
        context_size=options.context_size,
        settings=settings,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    return result, f"{baselines_markdown(result)}\nwritten: {options.out}"


def _saes(options: argparse.Namespace) -> list[str]:
    """Return the SAEs named, or those that the config named trains into `<out>-saes`."""
    from sae_italian.training import read_values, spec_from_dict, suite_from_dict, train, train_suite
    from sae_italian.training.config import SUITE_KEY

    overrides = [name for name in options.saes if "=" in name]
    names = [name for name in options.saes if "=" not in name]
    if not any(name.endswith(".yaml") or name.startswith(("mini/", "configs/")) for name in names):
        if overrides:
            raise UsageError(f"{overrides[0]} sets a config's key, but SAEs were given, not a config.")
        return names
    if len(names) > 1:
        raise UsageError(f"give one config, or SAEs; found {', '.join(names)}.")
    values = read_values(names[0], *overrides)
    folder = options.out.with_name(f"{options.out.name}-saes")
    flags = {"resume": options.resume, "overwrite": options.overwrite}
    if SUITE_KEY not in values:
        return [str(train(spec_from_dict(values), folder, **flags))]
    suite = suite_from_dict(values)
    if "TC" in suite.sites:
        raise UsageError("baselines decompose the activations of one hook; take site TC out of the suite: sites=[R].")
    return [str(path) for path in train_suite(suite, folder, **flags)]
