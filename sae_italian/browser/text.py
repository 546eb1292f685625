"""One latent's card as text, for a terminal."""

from __future__ import annotations

from sae_italian.browser.schema import CardRecord, RowRecord

STRONG = 0.5  # share of the latent's maximum from which a token is marked


def card_text(row: RowRecord, card: CardRecord, *, contexts: int = 4, language: str = "it") -> str:
    """Return explanation, scores and the strongest passages; **strong** tokens are marked, as in the page."""
    explanation = (row["explanation_it"] if language == "it" else row["explanation_en"]) or row["status"] or "dead"
    lines = [f"latent {row['latent']}: {explanation}"]
    lines.append(f"density {100 * row['density']:.2f} %, max {row['max']:.2f}, {row['n_active']:,} active tokens")
    for score in card["scores"]:
        if score["metric"] == "balanced_accuracy" and score["value"] is not None:
            interval = "" if score["lo"] is None else f" [{score['lo']:.2f}, {score['hi']:.2f}]"
            test = f"{score['scorer']} ({score['negatives']}, {score['judge']})"
            lines.append(f"{score['explainer']:17} {test:38} {score['value']:.2f}{interval}")
    if card["promoted"]:
        lines.append("promotes   " + ", ".join(f"«{item['token'].strip()}»" for item in card["promoted"][:5]))
    passages = [context for group in card["groups"] for context in group["contexts"]]
    step = max(1, len(passages) // contexts)  # from the strongest to the weakest
    for context in passages[::step][:contexts]:
        text = "".join(_marked(piece, value, row["max"]) for piece, value in context["segments"])
        lines.append(f"{context['max']:7.2f}  {' '.join(text.split())}")
    return "\n".join(lines)


def _marked(piece: str, value: float, largest: float) -> str:
    if not largest or value < STRONG * largest or not piece.strip():
        return piece
    stripped = piece.strip()
    return piece.replace(stripped, f"**{stripped}**", 1)
