"""Distribution shift and geometry of Llama Scope (sections 4 and 5) as steps."""

from __future__ import annotations

from typing import Any

from sae_italian.analysis.geometry.report import geometry, matches_svg
from sae_italian.analysis.shift import context_shift, default_edges
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain
from sae_italian.evaluation.jumprelu import held_out_activations
from sae_italian.papers.document import Section, from_markdown
from sae_italian.papers.job import Job, Results, Step
from sae_italian.saes import load_sae
from sae_italian.saes.jumprelu_export import to_jumprelu

SAMPLE = 4096  # latents of each SAE that are compared
MOST = 4  # SAEs


def _reference(results: Results) -> dict[str, Any]:
    saes = results["saes"]["saes"]
    return min(saes, key=lambda row: (row["site"] != "R", row["expansion"]))


def as_in_the_paper(job: Job, sae: Any) -> Any:
    """Return a TopK SAE as the JumpReLU that the paper evaluates, whose L0 may move; any other as it is."""
    if sae.cfg.architecture() != "topk":
        return sae
    subject = job.subject
    x, y = held_out_activations(
        sae,
        subject.model,
        subject.corpus,
        job.budget["card_tokens"],
        context_size=subject.context_size,
        text_column=subject.text_column,
    )
    return to_jumprelu(sae, x, y)[0]


def _shift(job: Job, results: Results) -> dict[str, Any]:
    """Measure by position in contexts up to eight times the training's; packed where no document is that long."""
    subject, entry = job.subject, _reference(results)
    sae = as_in_the_paper(job, load_sae(entry["folder"]))
    longest = getattr(subject.model.config, "max_position_embeddings", None)
    edges = default_edges(subject.context_size, longest)
    if len(edges) < 4:
        raise UsageError(f"{subject.name} has {longest} positions, no more than the training's context.")
    shift = context_shift(
        sae,
        subject.model,
        subject.corpus,
        edges=edges,
        n_tokens=job.budget["shift_tokens"],
        packed=True,
        text_column=subject.text_column,
        name=entry["name"],
    )
    known, last = shift.bucket(shift.reference), shift.buckets[-1]
    fvu = [1 - bucket.numbers["explained_variance"].value for bucket in (known, last)]
    l0 = [bucket.numbers["l0"].value for bucket in (known, last)]
    return {
        **shift.as_dict(),
        "text": f"positions {last.name} against {known.name}: FVU {100 * (fvu[1] / fvu[0] - 1):+.0f} %, "
        f"L0 {l0[0]:.1f} to {l0[1]:.1f}",
        "table": shift.table().splitlines(),
        "changes": shift.changes().splitlines(),
        "notes": shift.notes(),
        "svg": shift.svg(),
    }


def _shift_section(result: dict[str, Any], _: Results) -> Section:
    text = (
        f"By position in the window, in tokens; the training's context ends with the bucket {result['reference']}. A TopK "
        "SAE is measured as JumpReLU, as in the paper, so that its L0 can move. Windows are filled with short documents, "
        "one after the other. " + " ".join(result["notes"]),
        f"Per posizione nella finestra, in token; il contesto dell'addestramento finisce con {result['reference']}. La SAE "
        "TopK è misurata come JumpReLU, come nell'articolo.",
    )
    tables = [
        from_markdown(result["table"]),
        from_markdown(result["changes"], f"changes against {result['reference']}"),
    ]
    return Section(("Longer contexts (figure 5)", "Contesti più lunghi"), text, tables, [("shift", result["svg"])])


def _geometry(job: Job, results: Results) -> dict[str, Any]:
    """Compare decoder directions at one place across widths, or the one SAE with itself; dead latents left out."""
    first = _reference(results)
    entries = [row for row in results["saes"]["saes"] if (row["site"], row["layer"]) == (first["site"], first["layer"])]
    saes = {row["name"]: load_sae(row["folder"]) for row in entries[:MOST]}
    found = geometry(saes, sample=SAMPLE)
    inside = "; ".join(f"{c.source}: {c.threshold:.3f} (random {c.random.largest:.3f})" for c in found.within)
    matches = "; ".join(
        f"{c.source} to {c.target}: median {c.matches.quantiles['50 %']:.2f}, random {c.random.quantiles['50 %']:.2f}, "
        f"{100 * c.above_random.value:.0f} % above the largest random"
        for c in found.between
    )
    return {
        **plain(found),
        "thresholds": inside,
        "matches": matches or None,
        "table": found.table().splitlines(),
        "svg": matches_svg([*found.between, *found.within]),
    }


def _geometry_section(result: dict[str, Any], _: Results) -> Section:
    text = (
        "Best matches of decoder directions, within an SAE and between widths at one place; neighbours from the threshold "
        "on, which is high where d_in is small. New: without a neighbour in the other SAE; splits: nearest of two latents or "
        "more of the first.",
        "Migliori corrispondenze tra direzioni di decodifica, dentro una SAE e tra ampiezze diverse nello stesso punto.",
    )
    title = ("Geometry (figures 7 and 8)", "Geometria")
    return Section(title, text, [from_markdown(result["table"])], [("geometry", result["svg"])])


SHAPES = (
    Step("shift", ("Longer contexts", "Contesti più lunghi"), _shift, _shift_section, True),
    Step("geometry", ("Geometry", "Geometria"), _geometry, _geometry_section, True),
)
