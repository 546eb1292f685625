"""One command per paper: its whole evaluation on any model, and one report with the paper's own figures beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import claim_folder, write_json
from sae_italian.papers import clic_it, cunningham, llama_scope
from sae_italian.papers.document import Document, Section, Table
from sae_italian.papers.job import SKIPPED, Job, Results, Step, run_steps
from sae_italian.papers.paper import Paper, beside, paper
from sae_italian.papers.subject import MINI, open_subject
from sae_italian.saes import check_fits, load_sae, weights_hash

KIND = "reproduce"
STEPS: dict[str, tuple[Step, ...]] = {
    "cunningham-2023": cunningham.STEPS,
    "llama-scope": llama_scope.STEPS,
    "clic-it-2025": clic_it.STEPS,
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
    chosen = paper(name)
    budget = chosen.with_budget(*overrides)
    out = Path(out)
    loaded = load_sae(sae) if sae is not None else None
    if loaded is not None and getattr(loaded.cfg.metadata, "hook_name_out", None):
        raise UsageError(f"{sae} is a transcoder; give an SAE, or none to have transcoders trained.")
    if model is None and loaded is not None:
        model = str(loaded.cfg.metadata.model_name)
    subject = open_subject(model or MINI, sae=loaded, corpus=corpus, text_column=text_column, context_size=context_size)
    if loaded is not None:
        check_fits(loaded, subject.model)
    spec = {key: value for key, value in subject._asdict().items() if key != "model"}
    spec |= {"paper": name, "sae": weights_hash(loaded) if loaded is not None else None, "budget": budget}
    claim_folder(out, KIND, spec, resume=resume, overwrite=overwrite)
    job = Job(chosen, subject, budget, out, sae)
    results, seconds = run_steps(job, STEPS[name])
    report = {
        "paper": {"name": name, "title": chosen.title, "authors": chosen.authors, "link": chosen.link},
        "model": subject.name,
        "corpus": subject.corpus,
        "context_size": subject.context_size,
        "sae": sae,
        "budget": budget,
        "figures": beside(chosen.figures, results),
        "steps": results,
        "seconds": seconds,
    }
    write_json(out / "report.json", without_pictures(report))
    document(chosen, report).write(out)
    return without_pictures(report)


def without_pictures(value: Any) -> Any:
    """Return a result without the SVG texts in it."""
    if isinstance(value, dict):
        return {key: without_pictures(item) for key, item in value.items() if key != "svg"}
    return [without_pictures(item) for item in value] if isinstance(value, list) else value


def document(chosen: Paper, report: dict[str, Any]) -> Document:
    """Return the report as a document, from its JSON alone."""
    title = (
        f"{chosen.title}: on {report['model']}",
        f"L'analisi dell'articolo, svolta su {report['model']}",
    )
    seconds = sum(report["seconds"].values())
    done = (
        f"{chosen.setting[0]} Here: {report['model']}, {report['corpus']}, context {report['context_size']} tokens; "
        f"{chosen.authors}, {chosen.link}. {seconds:,.0f} s in all."
    )
    fatto = (
        f"{chosen.setting[1]} Qui: {report['model']}, {report['corpus']}, contesto di {report['context_size']} token."
    )
    sections = [figures_section(report), budget_section(report)]
    sections += [_section(step, report["steps"]) for step in STEPS[chosen.name]]
    return Document(title, (done, fatto), sections)


def figures_section(report: dict[str, Any]) -> Section:
    """Return the paper's figures beside ours."""
    rows = [(f"{r['what']} · {r['what_it']}", r["where"], r["paper"], r["ours"]) for r in report["figures"]]
    text = (
        "Models, texts and training differ by orders of magnitude: compare directions, not digits.",
        "Modelli, testi e addestramento differiscono di ordini di grandezza: contano le direzioni, non le cifre.",
    )
    head = ("figure", "in the paper", "the paper's", "ours")
    return Section(("The paper and this run", "L'articolo e questa prova"), text, [Table("", head, rows)])


def budget_section(report: dict[str, Any]) -> Section:
    """Return what was spent: the budget in tokens, and the seconds of each step."""
    budget = Table("", ("budget", ""), [(key, str(value)) for key, value in report["budget"].items()])
    seconds = Table("", ("step", "seconds"), [(key, f"{value:,.1f}") for key, value in report["seconds"].items()])
    return Section(("Budget", "Risorse"), ("Sizes in tokens.", "Dimensioni in token."), [budget, seconds])


def _section(step: Step, results: Results) -> Section:
    result = results[step.name]
    if SKIPPED in result:
        return Section(step.title, skipped=result[SKIPPED])
    return step.section(result, results)
