"""Llama Scope (arXiv 2410.20526), the whole evaluation: sites and widths, TopK against L1, JumpReLU, shift, geometry."""

from typing import Any

import pandas as pd

from sae_italian.analysis.geometry import fired, geometry, matches_svg
from sae_italian.analysis.shift import context_shift, default_edges
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain
from sae_italian.papers.job import Reproduction, Results, Step, facts_of
from sae_italian.papers.measure import card_of, held_out, score_sae
from sae_italian.papers.report import shown, suite_svg
from sae_italian.saes import load_sae
from sae_italian.saes.jumprelu import to_jumprelu

L1 = (0.5, 2.0, 8.0)  # coefficients of the L1 SAEs, times the square root of d_in / 128
NORMALISED = "expected_average_only_in"  # what the L1 SAEs read, as SAELens calls it
SAMPLE = 4096  # latents of each SAE whose directions are compared
MOST = 4  # SAEs whose directions are compared
_KEPT = ("l0", "explained_variance", "explained_variance_uncentred", "delta_lm_loss", "dead", "ultra_active")


def _saes(job: Reproduction, _: Results) -> dict[str, Any]:
    """Train the suite, or take the SAE that was given."""
    folders = job.train_suite(job.layers(1)) if job.sae is None else [job.sae]
    facts = [facts_of(folder) for folder in folders]
    named = [{"name": f"L{row['layer']}{row['site']}-{row['expansion']:g}x", **row} for row in facts]
    return {"saes": named, "given": job.sae is not None}


def narrowest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the narrowest SAE on the residual stream, the first of any site where there is none."""
    return min(rows, key=lambda row: (row["site"] != "R", row["expansion"]))


def _reference(results: Results) -> tuple[dict[str, Any], Any]:
    entry = narrowest(results["saes"]["saes"])
    return entry, load_sae(entry["folder"])


# --- sites and widths -----------------------------------------------------------------------------------------------


def _kept(job: Reproduction, sae: Any, name: str) -> dict[str, Any]:
    card = card_of(sae, job.subject, job.budget["card_tokens"], name, job.budget["loss_tokens"])
    return {key: card[key] for key in _KEPT}


def _cards(job: Reproduction, results: Results) -> dict[str, Any]:
    rows = [entry | _kept(job, load_sae(entry["folder"]), entry["name"]) for entry in results["saes"]["saes"]]
    n_tokens = job.budget["card_tokens"]
    return {"n_tokens": n_tokens, "rows": rows, **derived(rows, n_tokens), "svg": suite_svg(rows)}


def derived(rows: list[dict[str, Any]], n_tokens: int) -> dict[str, Any]:
    """Return what the paper says about its figures, of ours."""
    frame: Any = pd.DataFrame({key: [row[key] for row in rows] for key in ("site", "expansion")})
    frame["variance"] = [row["explained_variance_uncentred"]["value"] for row in rows]
    variance = frame.pivot_table("variance", "site", "expansion")  # means over layers
    narrow, wide, first = min(variance), max(variance), narrowest(rows)
    ranked = variance[narrow].dropna().sort_values(ascending=False)
    gain = (variance[wide] - variance[narrow])[ranked.index].dropna()
    reference = [shown(first[key]) for key in ("explained_variance_uncentred", "delta_lm_loss")]
    return {
        "l0": ", ".join(f"{row['name']} {row['l0']['value']:.1f}" for row in rows),
        "reference": f"{first['name']}: {reference[0]}, {reference[1]} nats",
        "best_site": ", ".join(f"{site} {value:.3f}" for site, value in ranked.items()) if len(ranked) > 1 else None,
        "width_gain": "; ".join(f"{site} {value:+.3f}" for site, value in gain.items()) if wide > narrow else None,
        "dead": f"{_range(rows, 'dead')} in {n_tokens:,} tokens",
        "ultra_active": _range(rows, "ultra_active"),
    }


def _range(rows: list[dict[str, Any]], key: str) -> str:
    values = [100 * row[key]["value"] for row in rows]
    return f"{min(values):.1f} %" if min(values) == max(values) else f"{min(values):.1f} to {max(values):.1f} %"


# --- the changes to TopK --------------------------------------------------------------------------------------------


def _jumprelu(job: Reproduction, results: Results) -> dict[str, Any]:
    entry, sae = _reference(results)
    exported = to_jumprelu(sae, *held_out(sae, job.subject, job.budget["card_tokens"]), thresholds="one")
    report = exported.cfg.metadata.jumprelu_export
    variance = "{explained_variance_before:.4f} to {explained_variance:.4f}".format(**report)
    text = f"L0 {report['l0_before']:.2f} to {report['l0']:.2f}, explained variance {variance}"
    return {**plain(report), "sae": entry["name"], "text": text}


def _compared(
    job: Reproduction, name: str, results: Results, share: str, sae: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train one more SAE at the reference's place and width, and return its card."""
    place = [narrowest(results["saes"]["saes"])[key] for key in ("hook_name", "d_sae")]
    folder = job.train(name, *place, job.budget["compare_tokens"], f"k_anneal_share={share}", sae=sae)
    return {"name": name, **_kept(job, load_sae(folder), name)}


def _annealing(job: Reproduction, results: Results) -> dict[str, Any]:
    """Train with K falling from d_in in the first tenth of the steps, and with K from the start."""
    rows = [_compared(job, "annealed", results, "0.1"), _compared(job, "not-annealed", results, "0")]
    variance = [shown(row["explained_variance_uncentred"]) for row in rows]
    dead = [shown(row["dead"]["value"], percent=True) for row in rows]
    return {"rows": rows, "text": f"{variance[0]} with, {variance[1]} without; dead {dead[0]} and {dead[1]}"}


def _vanilla(job: Reproduction, results: Results) -> dict[str, Any]:
    """Train L1 SAEs of several coefficients beside TopK."""
    scale = job.scale
    rows: list[dict[str, Any]] = [_compared(job, "annealed", results, "0.1") | {"name": "TopK"}]
    for factor in L1:
        l1 = {"architecture": "standard", "start": job.budget["start"] or "zero", "normalize_activations": NORMALISED}
        l1 |= {"l1_coefficient": factor * scale}
        rows.append(_compared(job, f"vanilla-{factor:g}", results, "0", l1) | {"name": f"L1, {factor * scale:.3g}"})
    numbers = [(row["name"], *(row[key]["value"] for key in ("l0", "explained_variance_uncentred"))) for row in rows]
    return {"rows": rows, "text": "; ".join(f"{name}: L0 {l0:.1f}, {variance:.3f}" for name, l0, variance in numbers)}


# --- interpretability, longer contexts, geometry --------------------------------------------------------------------


def _scores(job: Reproduction, results: Results) -> dict[str, Any]:
    entry, sae = _reference(results)
    found = score_sae(sae, job, job.out / "cache", name=entry["folder"], random_control=True)
    auto = found["autointerp"]
    below = 100 * (1 - (auto["share_detected"]["value"] or 0.0))
    text = f"{below:.0f} % of {auto['n_scored']} scored latents have a detection score below 0.8 (rule judge)"
    return {**found, "sae": entry["name"], "not_detected": text}


def _shift(job: Reproduction, results: Results) -> dict[str, Any]:
    """Measure by position in contexts up to eight times the training's, which are filled with short documents.

    A TopK SAE is measured as the JumpReLU that the paper evaluates, whose L0 may move; any other as it is.
    """
    subject, (entry, sae) = job.subject, _reference(results)
    longest = getattr(subject.model.config, "max_position_embeddings", None)
    edges = default_edges(subject.context_size, longest)
    if len(edges) < 4:
        raise UsageError(f"{subject.name} has {longest} positions, no more than the training's context.")
    if sae.cfg.architecture() == "topk":
        sae = to_jumprelu(sae, *held_out(sae, subject, job.budget["card_tokens"]), thresholds="one")
    read: dict[str, Any] = {"text_column": subject.text_column, "n_tokens": job.budget["shift_tokens"], "packed": True}
    shift = context_shift(sae, subject.model, subject.corpus, edges=edges, name=entry["name"], **read)
    table, _, changes, *said = shift.parts()
    known, last = shift.bucket(shift.reference), shift.buckets[-1]
    fvu = [1 - bucket.numbers["explained_variance"].value for bucket in (known, last)]
    l0 = [bucket.numbers["l0"].value for bucket in (known, last)]
    grown = f"FVU {100 * (fvu[1] / fvu[0] - 1):+.0f} %, L0 {l0[0]:.1f} to {l0[1]:.1f}"
    return {
        **shift.as_dict(),
        "text": f"positions {last.name} against {known.name}: {grown}",
        "table": table.splitlines(),
        "changes": changes.splitlines(),
        "said": " ".join(said),
        "svg": shift.svg(),
    }


def _geometry(job: Reproduction, results: Results) -> dict[str, Any]:
    """Compare directions of latents that fired in training, across widths at one place or of one SAE."""
    rows = results["saes"]["saes"]
    first = narrowest(rows)
    entries = [row for row in rows if (row["site"], row["layer"]) == (first["site"], first["layer"])]
    folders = {row["name"]: row["folder"] for row in entries[:MOST]}
    live = {name: fired(folder) for name, folder in folders.items()}
    found = geometry({name: load_sae(each) for name, each in folders.items()}, alive=live, sample=SAMPLE)
    own = [f"{c.source}: {c.threshold:.3f} (random {c.random.largest:.3f})" for c in found.within]
    matches = "; ".join(
        f"{c.source} to {c.target}: median {c.matches.quantiles['50 %']:.2f}, random {c.random.quantiles['50 %']:.2f}, "
        f"{100 * c.above_random.value:.0f} % above the largest random"
        for c in found.between
    )
    matches += "".join(f"; {note}" for note in found.notes)
    facts = {"thresholds": "; ".join(own), "matches": matches or None, "table": found.table().splitlines()}
    return {**plain(found), **facts, "svg": matches_svg([*found.between, *found.within])}


STEPS: dict[str, Step] = {
    "saes": _saes,
    "cards": _cards,
    "jumprelu": _jumprelu,
    "annealing": _annealing,
    "vanilla": _vanilla,
    "scores": _scores,
    "shift": _shift,
    "geometry": _geometry,
}
