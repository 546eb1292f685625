"""One command per paper: its whole evaluation on any model, and one report with the paper's own figures beside ours."""

from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import claimed, path_of, write_json
from sae_italian.papers import cunningham, llama_scope
from sae_italian.papers.job import (
    SKIPPED,
    Paper,
    Reproduction,
    Results,
    Step,
    facts_of,
    open_subject,
    paper,
    run_steps,
)
from sae_italian.papers.measure import card_of, examples, score_sae
from sae_italian.papers.report import NOT_DONE, SHARED, Parts, heading, image_of, scores_svg, section_of, write_report
from sae_italian.saes import check_fits, full_name, load_sae, weights_hash

# --- Bondielli, Passaro and Lenci (CLiC-it 2025): one TopK SAE, explained and scored, with examples ------------------


def _sae(job: Reproduction, _: Results) -> dict[str, Any]:
    """Train the SAE at the last layer but one, as the paper's 14 of 0 to 15, or take the one that was given."""
    budget, subject = job.budget, job.subject
    folder = job.sae
    if folder is None:
        layer = budget["layer"] if budget["layer"] is not None else max(0, subject.n_layers - 2)
        sizes = budget["expansion"] * subject.d_in, budget["train_tokens"]
        folder = str(job.train("sae", f"blocks.{layer}.hook_resid_post", *sizes))
    facts, k = facts_of(folder), getattr(load_sae(folder).cfg, "k", None)
    expansion = f"{facts['expansion']:g} ({facts['d_sae']:,} latents)"
    return {**facts, "given": job.sae is not None, "k": k, "expansion": expansion}


def _scores(job: Reproduction, results: Results) -> dict[str, Any]:
    folder = results["sae"]["folder"]
    found = score_sae(load_sae(folder), job, job.out / "cache", name=full_name(folder), random_control=True)
    auto = found["autointerp"]
    share = auto["n_explained"] / max(1, auto["n_latents"])
    explained = f"{auto['n_explained']:,} of {auto['n_latents']:,} live latents drawn ({100 * share:.1f} %)"
    return {**found, "explained": explained, "svg": scores_svg(auto, found["random"])}


def _card(job: Reproduction, results: Results) -> dict[str, Any]:
    return card_of(load_sae(results["sae"]["folder"]), job.subject, job.budget["card_tokens"], "sae")


def _examples(job: Reproduction, _: Results) -> dict[str, Any]:
    return {"examples": examples(job.out / "cache", job.subject.model.tokenizer, job.budget["examples"])}


CLIC_IT: dict[str, Step] = {"sae": _sae, "card": _card, "scores": _scores, "examples": _examples}


# --- the command -------------------------------------------------------------------------------------------------------

KIND = "reproduce"
STEPS: dict[str, dict[str, Step]] = {
    "cunningham-2023": cunningham.STEPS,
    "llama-scope": llama_scope.STEPS,
    "clic-it-2025": CLIC_IT,
}


def reproduce(
    name: str,
    out: str | Path,
    *overrides: str,
    model: str | None = None,
    sae: str | None = None,
    corpus: str | None = None,
    text_column: str = "text",
    context_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run a paper's evaluation into `out` and return the report, also written as report.json, .md and .html.

    `overrides` are `key=value` of the paper's budget. `sae`, a folder or release:sae_id, is evaluated instead of SAEs
    trained here by the paper's recipe; parts that train others beside it are then left out. The model defaults to the
    SAE's, else to the embedded one. Finished steps lie in `out/steps`, one JSON each; with `resume` they are read.
    Raises: UsageError for an unknown paper or key of the budget, for an SAE that does not fit, and as the steps do.
    """
    chosen, out = paper(name), path_of(out)
    budget = chosen.with_budget(*overrides)
    loaded = load_sae(sae) if sae is not None else None
    if loaded is not None and getattr(loaded.cfg.metadata, "hook_name_out", None):
        raise UsageError(f"{sae} is a transcoder; give an SAE, or none to have transcoders trained.")
    subject = open_subject(model, sae=loaded, corpus=corpus, text_column=text_column, context_size=context_size)
    if loaded is not None:
        check_fits(loaded, subject.model)
    spec = {key: value for key, value in subject._asdict().items() if key != "model"}
    spec |= {"paper": name, "sae": weights_hash(loaded) if loaded is not None else None, "budget": budget}
    with claimed(out, KIND, spec, resume=resume, overwrite=overwrite):
        results, seconds = run_steps(Reproduction(chosen, subject, budget, out, sae), STEPS[name])
        pictures = {step: result.pop("svg") for step, result in results.items() if "svg" in result}
        report = {
            "paper": {"name": name, "title": chosen.title, "authors": chosen.authors, "link": chosen.link},
            "model": subject.name,
            "corpus": subject.corpus,
            "context_size": subject.context_size,
            "sae": sae,
            "budget": budget,
            "figures": chosen.beside(results),
            "steps": results,
            "seconds": seconds,
        }
        write_json(out / "report.json", report)
        write_report(out, parts_of(chosen, report, pictures), pictures)
        return report


def parts_of(chosen: Paper, report: dict[str, Any], pictures: dict[str, str]) -> Parts:
    """Return the parts of the report from its JSON; each step's section ends with its picture."""
    facts = report | {
        "setting": chosen.setting,
        "total": sum(report["seconds"].values()),
        "figures": [row | {"both": f"{row['what']} · {row['what_it']}"} for row in report["figures"]],
        "budget_rows": [{"name": key, "value": str(value)} for key, value in report["budget"].items()],
        "second_rows": [{"name": key, "value": f"{value:,.1f}"} for key, value in report["seconds"].items()],
    }
    parts = section_of(SHARED["head"], facts, head=True)
    parts += section_of(SHARED["figures"], facts) + section_of(SHARED["resources"], facts)
    for name, words in chosen.steps.items():
        if SKIPPED in (result := report["steps"][name]):
            parts += [*heading(words["title"]), (f"{NOT_DONE}: {result[SKIPPED]}", "en")]
        else:
            parts += section_of(words, result) + [(image_of(name), "en")] * (name in pictures)
    return parts
