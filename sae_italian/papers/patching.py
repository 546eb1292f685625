"""The causal part of Cunningham et al. 2023 (section 4) as a step: IOI patching of the SAE's latents and of PCA's.

The paper compares dictionaries of four latents per dimension and four L1 coefficients with PCA, on 50 pairs at layer 11
of 24: what a sparse dictionary does not reconstruct keeps it from the target, however many latents are patched. Here it
is the middle one of the SAEs there are, and those of smaller L1 coefficients, once the model is known to do the task.
"""

from __future__ import annotations

from typing import Any

from sae_italian.analysis.causal.compare import patch_saes, thresholds
from sae_italian.analysis.tasks.ioi import ioi_pairs, ioi_score, words_for
from sae_italian.base.errors import UsageError
from sae_italian.base.report import plain
from sae_italian.papers.document import Section, from_markdown
from sae_italian.papers.job import RATIO, Job, Results, Step, variant
from sae_italian.saes import load_sae
from sae_italian.saes.baselines import TOPK

CHANCE = 0.5


def _ioi(job: Job, results: Results) -> dict[str, Any]:
    """Patch on pairs of Italian sentences. Raises: UsageError, which skips the step, for a model without the skill."""
    saes, budget, tokenizer = results["saes"]["saes"], job.budget, job.subject.model.tokenizer
    entry = saes[len(saes) // 2]
    pairs = ioi_pairs(budget["ioi_pairs"], tokenizer, words_for(job.subject.name), n_name_tokens=None, seed=0)
    skill = ioi_score(job.subject.model, tokenizer, pairs)
    if skill.accuracy.value <= CHANCE:
        raise UsageError(
            f"{job.subject.name} cannot name the indirect object: it is right in {100 * skill.accuracy.value:.0f} % of "
            f"{skill.n} sentences, chance is {100 * CHANCE:.0f} %. Patching would say nothing."
        )
    folder = job.out / "baselines" / f"L{entry['layer']}" / "dictionaries"
    dictionaries = {"SAE": load_sae(entry["folder"])}
    for factor in sorted(factor for factor in budget["l1"] if factor < 1):
        less_sparse = job.out / "saes" / variant(entry["layer"], RATIO, factor)
        if less_sparse.is_dir():
            dictionaries[f"SAE, L1 x {factor:g}"] = load_sae(less_sparse)
    if "pca" in budget["kinds"]:
        dictionaries |= {"PCA": load_sae(folder / "pca"), "PCA, top-k": load_sae(folder / ("pca" + TOPK))}
    steps = thresholds(budget["ioi_thresholds"])
    found = patch_saes(job.subject.model, tokenizer, dictionaries, pairs, thresholds=steps)
    return {
        "layer": entry["layer"],
        "skill": plain(skill),
        "half": "; ".join(_half(curve) for curve in found.curves),
        **found.as_dict(),
        "table": found.table().splitlines(),
        "svg": found.svg(),
    }


def _half(curve: Any) -> str:
    point = curve.reached(0.5)
    return f"{curve.name} never" if point is None else f"{curve.name} {point.n_patched} (edit {point.magnitude:.2f})"


def _ioi_section(result: dict[str, Any], _: Results) -> Section:
    accuracy = 100 * result["skill"]["accuracy"]["value"]
    text = (
        f"{result['n_pairs']} pairs of Italian sentences, layer {result['layer']}; the model names the indirect object in "
        f"{accuracy:.0f} % of them. Latents are patched from the run with another indirect object at every token, the "
        "reconstruction error added back, and un-patched by rising thresholds (ACDC on a flat graph). Fewer patches and a "
        "smaller edit for the same KL are better. Less sparse SAEs come nearer when all is patched.",
        f"{result['n_pairs']} coppie di frasi italiane, strato {result['layer']}; il modello nomina il complemento di "
        f"termine nel {accuracy:.0f} % dei casi. Meno latenti sostituiti e modifiche più piccole, a pari KL, sono meglio.",
    )
    title = ("Indirect objects: feature patching (figure 3)", "Complemento di termine: sostituzione di latenti")
    return Section(title, text, [from_markdown(result["table"])], [("ioi", result["svg"])])


PATCHING = (Step("ioi", ("Indirect objects", "Complemento di termine"), _ioi, _ioi_section, True),)
