"""The README.md of a published SAE: front matter that the hub reads, and what to know of it in Italian and English."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sae_italian.base.labels import label
from sae_italian.base.storage import read_json
from sae_italian.evaluation.card import DENSITY_PICTURE, EvaluationCard
from sae_italian.models import catalogue
from sae_italian.training.run import read_run

# What the front matter states as results, for the hub's tables.
_RESULTS = ("l0", "explained_variance", "explained_variance_uncentred", "ce_loss_recovered", "delta_lm_loss", "dead")


def model_card(folder: Path, card: EvaluationCard, repo_id: str, sae_id: str, licence: str | None = None) -> str:
    """Return the README.md of the SAE in `folder`, as Markdown with YAML front matter."""
    cfg = read_json(folder / "cfg.json")
    spec: dict[str, Any] = read_run(folder).get("spec") or {}
    values = _front_matter(card, cfg, sae_id, licence or _licence(card.model))
    front = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    picture = f"\n![density]({DENSITY_PICTURE})\n" if (folder / DENSITY_PICTURE).is_file() else ""
    return "\n".join(
        [
            "---",
            front.rstrip(),
            "---",
            "",
            f"# {sae_id}: SAE per / for {card.model}",
            "",
            *_italian(card, cfg, spec),
            "",
            *card.table("it"),
            "",
            *_english(card, cfg, spec),
            "",
            *card.table("en"),
            picture,
            "## Uso / Use",
            "",
            "```python",
            "from sae_lens import SAE",
            "",
            f'sae = SAE.from_pretrained("{repo_id}", "{sae_id}")',
            "```",
            "",
            f'Card: `{sae_id}/card.json`; recomputed with `sae-italian evaluate "{repo_id}:{sae_id}"`.',
            "",
        ]
    )


def _front_matter(card: EvaluationCard, cfg: dict[str, Any], sae_id: str, licence: str) -> dict[str, Any]:
    architecture = cfg.get("architecture", "sae")
    front: dict[str, Any] = {
        "library_name": "saelens",
        "license": licence,
        "language": ["it"],
        "tags": ["sparse-autoencoder", "sae", "saelens", "sae-italian", "mechanistic-interpretability", architecture],
        "metrics": list(_RESULTS),
    }
    if _on_hub(card.model):
        front["base_model"] = card.model
    if _on_hub(card.corpus) and "," not in card.corpus:
        front["datasets"] = [card.corpus]
    dataset = {
        "type": card.corpus if _on_hub(card.corpus) else "local",
        "name": Path(card.corpus).name,
        "split": card.split,
    }
    measured = [
        {"type": key, "name": label(f"card.{key}"), "value": getattr(card, key).value}
        for key in _RESULTS
        if getattr(card, key).value == getattr(card, key).value
    ]
    front["model-index"] = [
        {
            "name": sae_id,
            "results": [
                {
                    "task": {"type": "feature-extraction", "name": "sparse reconstruction of activations"},
                    "dataset": dataset,
                    "metrics": measured,
                }
            ],
        }
    ]
    return front


def _licence(model: str) -> str:
    """Return the model's licence in the hub's word; `other` for a model that the catalogue does not know."""
    entry = catalogue().get(model)
    return entry.licence.lower() if entry else "other"


def _on_hub(name: str) -> bool:
    """Return whether a name has the form of a hub id, owner/name, and is no path."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~", "hf:")) and not Path(name).exists()


def _italian(card: EvaluationCard, cfg: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    trained = (
        f"{spec['training_tokens']:,} token di `{Path(str(spec['corpus'])).name}`".replace(",", ".") if spec else ""
    )
    return [
        "## Italiano",
        "",
        f"Autoencoder sparso ({cfg.get('architecture')}) con {_thousands(card.d_sae)} latenti, letto in `{card.hook_name}`"
        + (f" e ricostruito in `{card.hook_name_out}`" if card.hook_name_out != card.hook_name else "")
        + f" di {card.model}"
        + (f", addestrato su {trained}." if trained else "."),
        f"Misurato su {_thousands(card.n_tokens)} token di testo mai visto ({_thousands(card.n_documents)} documenti), "
        f"finestre di {card.context_size}, senza token speciali; intervalli al 95 % per ricampionamento dei documenti."
        + (f" Perdite e KL sui primi {_thousands(card.n_loss_tokens)}." if card.n_loss_tokens < card.n_tokens else ""),
        "I latenti descrivono questo modello su questo testo: non sono stati verificati altrove.",
    ]


def _english(card: EvaluationCard, cfg: dict[str, Any], spec: dict[str, Any]) -> list[str]:
    trained = f", trained on {spec['training_tokens']:,} tokens of `{Path(str(spec['corpus'])).name}`" if spec else ""
    where = f"`{card.hook_name}`" + (f" to `{card.hook_name_out}`" if card.hook_name_out != card.hook_name else "")
    return [
        "## English",
        "",
        f"A sparse autoencoder ({cfg.get('architecture')}) of {card.d_sae:,} latents at {where} of {card.model}{trained}.",
        f"Measured on {card.n_tokens:,} tokens of held-out text ({card.n_documents:,} documents), windows of "
        f"{card.context_size}, without special tokens; 95 % intervals, bootstrapped over documents."
        + (f" Losses and KL on the first {card.n_loss_tokens:,}." if card.n_loss_tokens < card.n_tokens else ""),
        "The latents describe this model on this text; they have not been checked elsewhere.",
    ]


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", ".")
