"""Bondielli, Passaro and Lenci (CLiC-it 2025), the whole evaluation: one TopK SAE, explained and scored, with examples."""

from __future__ import annotations

from typing import Any

from sae_italian.papers.job import Reproduction, Results, Step, facts_of
from sae_italian.papers.measure import card_of, examples, score_sae
from sae_italian.papers.pictures import scores_svg
from sae_italian.saes import full_name, load_sae


def _sae(job: Reproduction, _: Results) -> dict[str, Any]:
    """Train the SAE at the last layer but one, as the paper's 14 of 0 to 15, or take the one that was given."""
    budget, subject = job.budget, job.subject
    folder = job.sae
    if folder is None:
        layer = budget["layer"] if budget["layer"] is not None else max(0, subject.n_layers - 2)
        sizes = budget["expansion"] * subject.d_in, budget["train_tokens"]
        folder = str(job.train("sae", f"blocks.{layer}.hook_resid_post", *sizes))
    facts, k = facts_of(folder), getattr(load_sae(folder).cfg, "k", None)
    expansion = f"{facts['d_sae'] / facts['d_in']:g} ({facts['d_sae']:,} latents)"
    return {**facts, "given": job.sae is not None, "k": k, "expansion": expansion}


def _card(job: Reproduction, results: Results) -> dict[str, Any]:
    return card_of(load_sae(results["sae"]["folder"]), job.subject, job.budget["card_tokens"], "sae")


def _scores(job: Reproduction, results: Results) -> dict[str, Any]:
    folder = results["sae"]["folder"]
    found = score_sae(load_sae(folder), job, job.out / "cache", name=full_name(folder), random_control=True)
    auto = found["autointerp"]
    share = auto["n_explained"] / max(1, auto["n_latents"])
    explained = f"{auto['n_explained']:,} of {auto['n_latents']:,} live latents drawn ({100 * share:.1f} %)"
    return {**found, "explained": explained}


def _examples(job: Reproduction, _: Results) -> dict[str, Any]:
    return {"examples": examples(job.out / "cache", job.subject.model.tokenizer, job.budget["examples"])}


STEPS = (
    Step("sae", _sae),
    Step("card", _card),
    Step("scores", _scores, draw=lambda result, _: {"scores": scores_svg(result["autointerp"], result["random"])}),
    Step("examples", _examples),
)
