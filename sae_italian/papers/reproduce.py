"""One command per paper: its whole evaluation on any model, and one report with the paper's own figures beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.base.storage import claimed, write_json
from sae_italian.papers import clic_it, cunningham, llama_scope
from sae_italian.papers.job import MINI, Reproduction, Step, open_subject, run_steps
from sae_italian.papers.paper import SKIPPED, Paper, paper
from sae_italian.papers.report import ReportPages, ReportTable, Section
from sae_italian.saes import check_fits, load_sae, weights_hash

KIND = "reproduce"
FIGURES_HEAD = ("figure", "in the paper", "the paper's", "ours")
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
    with claimed(out, KIND, spec, resume=resume, overwrite=overwrite):
        job = Reproduction(chosen, subject, budget, out, sae)
        results, seconds = run_steps(job, STEPS[name])
        report = {
            "paper": {"name": name, "title": chosen.title, "authors": chosen.authors, "link": chosen.link},
            "model": subject.name,
            "corpus": subject.corpus,
            "context_size": subject.context_size,
            "sae": sae,
            "budget": budget,
            "figures": [figure.beside(results) for figure in chosen.figures],
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


def document(chosen: Paper, report: dict[str, Any]) -> ReportPages:
    """Return the report as a document, from its JSON alone."""
    model, corpus, context = (report[key] for key in ("model", "corpus", "context_size"))
    title = (f"{chosen.title}: on {model}", f"L'analisi dell'articolo, svolta su {model}")
    seconds = sum(report["seconds"].values())
    text = (
        f"{chosen.setting[0]} Here: {model}, {corpus}, context {context} tokens; {chosen.authors}, {chosen.link}. "
        f"{seconds:,.0f} s in all.",
        f"{chosen.setting[1]} Qui: {model}, {corpus}, contesto di {context} token.",
    )
    rows = [(f"{r['what']} · {r['what_it']}", r["where"], r["paper"], r["ours"]) for r in report["figures"]]
    direction = (
        "Models, texts and training differ by orders of magnitude: compare directions, not digits.",
        "Modelli, testi e addestramento differiscono di ordini di grandezza: contano le direzioni, non le cifre.",
    )
    figures = ReportTable("", FIGURES_HEAD, rows)
    budget = ReportTable("", ("budget", ""), [(key, str(value)) for key, value in report["budget"].items()])
    times = ReportTable("", ("step", "seconds"), [(key, f"{value:,.1f}") for key, value in report["seconds"].items()])
    sections = [
        Section(("The paper and this run", "L'articolo e questa prova"), direction, [figures]),
        Section(("Budget", "Risorse"), ("Sizes in tokens.", "Dimensioni in token."), [budget, times]),
    ]
    for step in STEPS[chosen.name]:
        result = report["steps"][step.name]
        pictures = {step.name: result["svg"]} if "svg" in result else {}
        if step.draw is not None and SKIPPED not in result:
            pictures |= step.draw(result, report["steps"])
        sections.append(chosen.section(step.name, result, pictures))
    return ReportPages(title, text, sections)
