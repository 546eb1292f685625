"""Llama Scope (arXiv 2410.20526), the whole evaluation: sites and widths, TopK against L1, JumpReLU, shift, geometry."""

from __future__ import annotations

from typing import Any

from sae_italian.evaluation.jumprelu import held_out_activations
from sae_italian.papers.clic_it import score_table
from sae_italian.papers.document import Section, Table, shown
from sae_italian.papers.job import Job, Results, Step
from sae_italian.papers.pictures import suite_svg
from sae_italian.papers.scoring import card_of, score_sae
from sae_italian.papers.shapes import SHAPES
from sae_italian.papers.subject import layer_of
from sae_italian.saes import load_sae
from sae_italian.saes.jumprelu_export import to_jumprelu

L1 = (0.5, 2.0, 8.0)  # coefficients of the L1 SAEs, times the square root of d_in / 128
_KEPT = ("l0", "explained_variance", "explained_variance_uncentred", "delta_lm_loss", "dead", "ultra_active")


def _saes(job: Job, _: Results) -> dict[str, Any]:
    budget = job.budget
    if job.sae is not None:
        sae = load_sae(job.sae)
        expansion = sae.cfg.d_sae / sae.cfg.d_in
        name = f"L{layer_of(sae)}R-{expansion:g}x"
        row = {"name": name, "folder": job.sae, "site": "R", "layer": layer_of(sae), "expansion": expansion}
        return {"saes": [row], "given": True}
    trained = job.train_suite(
        "suite", job.layers(1), budget["sites"], budget["expansions"], budget["train_tokens"], budget["memory_gb"]
    )
    rows = []
    for name, folder in trained.items():
        place, width = name.split("-")
        site = place.lstrip("L0123456789")
        layer = int(place[1 : len(place) - len(site)])
        row = {"name": name, "folder": str(folder), "site": site, "layer": layer, "expansion": float(width[:-1])}
        rows.append(row)
    return {"saes": rows, "given": False}


def reference(results: Results) -> dict[str, Any]:
    """Return the narrowest SAE on the residual stream, the first of any site where there is none."""
    saes = results["saes"]["saes"]
    return min(saes, key=lambda row: (row["site"] != "R", row["expansion"]))


def _saes_section(result: dict[str, Any], _: Results) -> Section:
    text = (
        "R: residual stream, A: attention output, M: MLP output, TC: transcoder from MLP input to output; 8x: 8 latents "
        "per dimension.",
        "R: flusso residuo, A: uscita dell'attenzione, M: uscita dell'MLP, TC: transcoder dall'ingresso all'uscita "
        "dell'MLP; 8x: 8 latenti per dimensione.",
    )
    rows = [(row["name"], row["site"], str(row["layer"]), f"{row['expansion']:g}") for row in result["saes"]]
    table = Table("", ("name", "site", "layer", "latents per dimension"), rows)
    return Section(("The SAEs", "Le SAE"), text, [table])


# --- sites and widths -----------------------------------------------------------------------------------------------


def _cards(job: Job, results: Results) -> dict[str, Any]:
    rows = []
    for entry in results["saes"]["saes"]:
        sae = load_sae(entry["folder"])
        card = card_of(sae, job.subject, job.budget["card_tokens"], entry["name"], job.budget["loss_tokens"])
        values = card.as_dict()
        rows.append({**entry, "d_sae": sae.cfg.d_sae, **{key: values[key] for key in _KEPT}})
    return {"n_tokens": job.budget["card_tokens"], "rows": rows, **derived(rows, job.budget["card_tokens"])}


def derived(rows: list[dict[str, Any]], n_tokens: int) -> dict[str, Any]:
    """Return what the paper says about its figures, of ours."""
    narrow, wide = (pick(row["expansion"] for row in rows) for pick in (min, max))
    variance = {(row["site"], row["expansion"]): row["explained_variance_uncentred"]["value"] for row in rows}
    first = min(rows, key=lambda row: (row["site"] != "R", row["expansion"]))
    sites = {row["site"] for row in rows if row["expansion"] == narrow}
    ranked = sorted(sites, key=lambda site: -variance[site, narrow])
    gain = [
        f"{site} {variance[site, wide] - variance[site, narrow]:+.3f}" for site in ranked if (site, wide) in variance
    ]
    return {
        "l0": ", ".join(f"{row['name']} {row['l0']['value']:.1f}" for row in rows),
        "reference": f"{first['name']}: {shown(first['explained_variance_uncentred'])}, "
        f"{shown(first['delta_lm_loss'])} nats",
        "best_site": ", ".join(f"{site} {variance[site, narrow]:.3f}" for site in ranked) if len(ranked) > 1 else None,
        "width_gain": "; ".join(gain) if wide > narrow else None,
        "dead": f"{_range(rows, 'dead')} in {n_tokens:,} tokens",
        "ultra_active": _range(rows, "ultra_active"),
    }


def _range(rows: list[dict[str, Any]], key: str) -> str:
    values = [100 * row[key]["value"] for row in rows]
    return f"{min(values):.1f} %" if min(values) == max(values) else f"{min(values):.1f} to {max(values):.1f} %"


def _cards_section(result: dict[str, Any], _: Results) -> Section:
    head = ("SAE", "latents", "L0", "EV, uncentred", "EV, centred", "delta LM loss", "dead", "ultra-active")
    rows = [
        (
            row["name"],
            shown(row["d_sae"]),
            shown(row["l0"]["value"], 1),
            shown(row["explained_variance_uncentred"]),
            shown(row["explained_variance"]),
            shown(row["delta_lm_loss"]),
            shown(row["dead"]["value"], percent=True),
            shown(row["ultra_active"]["value"], percent=True),
        )
        for row in result["rows"]
    ]
    text = (
        f"On {result['n_tokens']:,} tokens of held-out text, 95 % intervals over documents; the paper's explained variance "
        "(EV) is the uncentred one, SAELens' the centred one. Each site has its own variance and its own loss to lose.",
        f"Su {result['n_tokens']:,} token tenuti da parte, intervalli al 95 % sui documenti; la varianza spiegata (EV) "
        "dell'articolo è quella non centrata.",
    )
    title = ("Sites and widths (figure 10)", "Siti e ampiezze")
    return Section(title, text, [Table("", head, rows)], [("suite", suite_svg(result["rows"]))])


# --- the changes to TopK --------------------------------------------------------------------------------------------


def _jumprelu(job: Job, results: Results) -> dict[str, Any]:
    sae, subject = load_sae(reference(results)["folder"]), job.subject
    x, y = held_out_activations(
        sae,
        subject.model,
        subject.corpus,
        job.budget["card_tokens"],
        context_size=subject.context_size,
        text_column=subject.text_column,
    )
    _, report = to_jumprelu(sae, x, y)
    found = report.as_dict()
    text = (
        f"L0 {report.l0_before:.2f} to {report.l0:.2f}, explained variance {report.explained_variance_before:.4f} to "
        f"{report.explained_variance:.4f}"
    )
    return {**found, "sae": reference(results)["name"], "text": text}


def _jumprelu_section(result: dict[str, Any], _: Results) -> Section:
    text = (
        f"{result['sae']} with one threshold {result['threshold']:.4f} for all latents, set on {result['n_tokens']:,} "
        f"tokens and checked on {result['n_tokens_checked']:,} others: {result['text']}.",
        "La stessa SAE con una sola soglia per tutti i latenti.",
    )
    return Section(("JumpReLU at inference (figure 11)", "JumpReLU in inferenza"), text)


def _compared(job: Job, name: str, results: Results, *overrides: str, sae: dict[str, Any] | None = None) -> Any:
    """Train one more SAE at the reference's place and width, and return its card."""
    entry = reference(results)
    d_sae = round(entry["expansion"] * job.subject.d_in)
    hook_name = load_sae(entry["folder"]).cfg.metadata.hook_name
    folder = job.train(name, hook_name, d_sae, job.budget["compare_tokens"], *overrides, sae=sae)
    card = card_of(load_sae(folder), job.subject, job.budget["card_tokens"], name, job.budget["loss_tokens"]).as_dict()
    return {"name": name, **{key: card[key] for key in _KEPT}}


def _annealing(job: Job, results: Results) -> dict[str, Any]:
    job.only_trained()
    rows = [
        _compared(job, "annealed", results, "k_anneal_share=0.1"),
        _compared(job, "not-annealed", results, "k_anneal_share=0"),
    ]
    first, second = rows
    text = (
        f"{shown(first['explained_variance_uncentred'])} with, {shown(second['explained_variance_uncentred'])} without; "
        f"dead {shown(first['dead']['value'], percent=True)} and {shown(second['dead']['value'], percent=True)}"
    )
    return {"rows": rows, "text": text}


def _vanilla(job: Job, results: Results) -> dict[str, Any]:
    job.only_trained()
    scale = (job.subject.d_in / 128) ** 0.5
    rows = [_compared(job, "annealed", results, "k_anneal_share=0.1") | {"name": "TopK"}]
    for factor in L1:
        settings = {
            "architecture": "standard",
            "l1_coefficient": factor * scale,
            "normalize_activations": "expected_average_only_in",
        }
        name = f"vanilla-{factor:g}"
        row = _compared(job, name, results, "k_anneal_share=0", sae=settings)
        rows.append(row | {"name": f"L1, {factor * scale:.3g}"})
    text = "; ".join(
        f"{row['name']}: L0 {row['l0']['value']:.1f}, {row['explained_variance_uncentred']['value']:.3f}"
        for row in rows
    )
    return {"rows": rows, "text": text}


def _rows_section(title: tuple[str, str], text: tuple[str, str], rows: list[dict[str, Any]]) -> Section:
    head = ("SAE", "L0", "EV, uncentred", "delta LM loss", "dead")
    cells = [
        (
            row["name"],
            shown(row["l0"]["value"], 1),
            shown(row["explained_variance_uncentred"]),
            shown(row["delta_lm_loss"]),
            shown(row["dead"]["value"], percent=True),
        )
        for row in rows
    ]
    return Section(title, text, [Table("", head, cells)])


def _annealing_section(result: dict[str, Any], _: Results) -> Section:
    title = ("K-annealing (figure 12)", "Annealing di K")
    text = (
        "K falls from d_in to its end in the first tenth of the steps, or is there from the start.",
        "K scende da d_in al valore finale nel primo decimo dei passi, o è quello dall'inizio.",
    )
    return _rows_section(title, text, result["rows"])


def _vanilla_section(result: dict[str, Any], _: Results) -> Section:
    title = ("TopK against L1 (figure 2)", "TopK contro L1")
    text = (
        "Equally many latents and tokens; the L1 SAEs differ in their coefficient.",
        "Stessi latenti e stessi token; le SAE L1 differiscono per il coefficiente.",
    )
    return _rows_section(title, text, result["rows"])


# --- interpretability -----------------------------------------------------------------------------------------------


def _scores(job: Job, results: Results) -> dict[str, Any]:
    entry = reference(results)
    found = score_sae(
        load_sae(entry["folder"]),
        job.subject,
        job.out / "cache",
        name=entry["folder"],
        n_tokens=job.budget["cache_tokens"],
        latents=job.budget["latents"],
        random_control=True,
    )
    auto = found["autointerp"]
    below = 100 * (1 - (auto["share_detected"]["value"] or 0.0))
    text = f"{below:.0f} % of {auto['n_explained']} explained latents have a detection score below 0.8 (rule judge)"
    return {**found, "sae": entry["name"], "not_detected": text}


def _scores_section(result: dict[str, Any], _: Results) -> Section:
    text = (
        f"{result['sae']}: live latents drawn at random, explained and judged by rule, without an LLM; the paper's GPT-4o "
        "saw top activations alone and gave 1 to 5.",
        "Latenti vivi estratti a caso, spiegati e giudicati con regole, senza LLM; nell'articolo GPT-4o vede solo le "
        "attivazioni più forti.",
    )
    return Section(("Interpretability (figure 3)", "Interpretabilità"), text, [score_table(result)])


STEPS = (
    Step("saes", ("The SAEs", "Le SAE"), _saes, _saes_section),
    Step("cards", ("Sites and widths", "Siti e ampiezze"), _cards, _cards_section),
    Step("jumprelu", ("JumpReLU at inference", "JumpReLU in inferenza"), _jumprelu, _jumprelu_section, True),
    Step("annealing", ("K-annealing", "Annealing di K"), _annealing, _annealing_section, True),
    Step("vanilla", ("TopK against L1", "TopK contro L1"), _vanilla, _vanilla_section, True),
    Step("scores", ("Interpretability", "Interpretabilità"), _scores, _scores_section),
    *SHAPES,
)
