"""Bondielli, Passaro and Lenci (CLiC-it 2025), the whole evaluation: one TopK SAE, explained and scored, with examples."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

from sae_italian.base.labels import label
from sae_italian.papers.document import Section, Table, shown
from sae_italian.papers.job import Job, Results, Step
from sae_italian.papers.pictures import scores_svg
from sae_italian.papers.scoring import card_of, examples, score_sae
from sae_italian.papers.subject import layer_of
from sae_italian.saes import load_sae

_CARD = ("l0", "explained_variance", "explained_variance_uncentred", "ce_loss_recovered", "delta_lm_loss")
LONGEST = 240  # characters of an explanation in the table; report.json has the whole
_SHARES = ("dead", "dead_in_100k", "ultra_active")


def _sae(job: Job, _: Results) -> dict[str, Any]:
    budget, subject = job.budget, job.subject
    if job.sae is not None:
        folder = job.sae
    else:
        layer = budget["layer"] if budget["layer"] is not None else max(0, subject.n_layers - 2)
        d_sae = budget["expansion"] * subject.d_in
        folder = str(job.train("sae", f"blocks.{layer}.hook_resid_post", d_sae, budget["train_tokens"]))
    cfg = load_sae(folder).cfg
    return {
        "folder": folder,
        "given": job.sae is not None,
        "layer": layer_of(load_sae(folder)),
        "hook_name": cfg.metadata.hook_name,
        "architecture": cfg.architecture(),
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "k": getattr(cfg, "k", None),
        "expansion": f"{cfg.d_sae / cfg.d_in:g} ({cfg.d_sae:,} latents)",
    }


def _sae_section(result: dict[str, Any], _: Results) -> Section:
    head = ("hook", "architecture", "d_in", "latents", "K")
    row = (result["hook_name"], result["architecture"], shown(result["d_in"]), shown(result["d_sae"]), str(result["k"]))
    given = ("The SAE was given.", "La SAE è stata data.")
    text = given if result["given"] else ("Trained here, by the recipe in scale.", "Addestrata qui, ricetta in scala.")
    return Section(("The SAE", "La SAE"), text, [Table("", head, [row])])


def _card(job: Job, results: Results) -> dict[str, Any]:
    return card_of(load_sae(results["sae"]["folder"]), job.subject, job.budget["card_tokens"], "sae").as_dict()


def card_rows(card: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of an evaluation card that a report shows."""
    rows = [(label(f"card.{key}"), shown(card[key])) for key in _CARD]
    return rows + [(label(f"card.{key}"), shown(card[key], percent=True)) for key in _SHARES]


def _card_section(result: dict[str, Any], _: Results) -> Section:
    text = (f"On {result['n_tokens']:,} tokens of held-out text.", f"Su {result['n_tokens']:,} token tenuti da parte.")
    return Section(("Reconstruction", "Ricostruzione"), text, [Table("", ("metric", "value"), card_rows(result))])


def _scores(job: Job, results: Results) -> dict[str, Any]:
    entry = results["sae"]
    name = str(Path(entry["folder"]).resolve()) if Path(entry["folder"]).is_dir() else entry["folder"]
    found = score_sae(
        load_sae(entry["folder"]),
        job.subject,
        job.out / "cache",
        name=name,
        n_tokens=job.budget["cache_tokens"],
        latents=job.budget["latents"],
        random_control=True,
    )
    auto = found["autointerp"]
    share = auto["n_explained"] / max(1, auto["n_latents"])
    explained = f"{auto['n_explained']:,} of {auto['n_latents']:,} live latents drawn ({100 * share:.1f} %)"
    return {**found, "explained": explained}


def score_table(scores: dict[str, Any]) -> Table:
    """Return the scores with their controls, one column an SAE."""
    rows = []
    for name, key, percent in (
        ("detection, balanced accuracy", "detection", False),
        ("fuzzing, balanced accuracy", "fuzzing", False),
        ("simulation, top and random", "simulation", False),
        ("simulation, random only", "simulation_random", False),
        ("latents with detection of 0.8 or more", "share_detected", True),
        ("shuffled explanations: detection", "shuffled_detection", False),
        ("token lookup: detection", "lookup_detection", False),
        ("gain over token lookup", "gain_over_lookup", False),
        ("latents that are only a token", "only_token", True),
    ):
        columns = [scores[part][key] for part in ("autointerp", "random") if part in scores]
        rows.append((name, *(shown(value, percent=percent) for value in columns)))
    head = ("", "this SAE", "random SAE")[: 2 + ("random" in scores)]
    return Table("", head, rows)


def _scores_section(result: dict[str, Any], _: Results) -> Section:
    auto = result["autointerp"]
    text = (
        f"{result['explained']}; rules as explanations and the rule judge, no LLM; 95 % intervals over latents. With an "
        "LLM: sae-italian autointerp on the folder cache.",
        "Spiegazioni e giudice a regole, senza LLM; intervalli al 95 % sui latenti. Con un LLM: sae-italian autointerp "
        "sulla cartella cache.",
    )
    title = ("Explanations and scores", "Spiegazioni e punteggi")
    return Section(title, text, [score_table(result)], [("scores", scores_svg(auto, result["random"]))])


def _examples(job: Job, _: Results) -> dict[str, Any]:
    return {"examples": examples(job.out / "cache", job.subject.model.tokenizer, job.budget["examples"])}


def _examples_section(result: dict[str, Any], _: Results) -> Section:
    rows = [
        (
            str(row["latent"]),
            shorten(row["explanation_it"], LONGEST, placeholder=" ..."),
            shorten(row["explanation_en"], LONGEST, placeholder=" ..."),
            shown(row["detection"]),
            shown(row["simulation"]),
            row["example"],
        )
        for row in result["examples"]
    ]
    head = ("latent", "spiegazione", "explanation", "detection", "simulation", "strongest segment")
    text = (
        "The best, the middling and the worst explained; text between « » is where the latent is active.",
        "I latenti spiegati meglio, così così e peggio; tra « » il testo su cui il latente è attivo.",
    )
    return Section(("Examples", "Esempi"), text, [Table("", head, rows)])


STEPS = (
    Step("sae", ("The SAE", "La SAE"), _sae, _sae_section),
    Step("card", ("Reconstruction", "Ricostruzione"), _card, _card_section),
    Step("scores", ("Explanations and scores", "Spiegazioni e punteggi"), _scores, _scores_section),
    Step("examples", ("Examples", "Esempi"), _examples, _examples_section),
)
