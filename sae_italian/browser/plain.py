"""A card and a list without scripts: as HTML for a notebook that is only read, and as text for a terminal."""

from __future__ import annotations

from html import escape
from typing import Any

from sae_italian.browser.columns import Record

N_ROWS, N_CONTEXTS, MAX_LETTERS = 50, 8, 400
STRONG = 0.5  # share of the latent's maximum from which a token is marked in a terminal
_BOX = "font:14px/1.5 system-ui,sans-serif;max-width:60rem"
_CELL = "text-align:left;vertical-align:top;padding:2px 14px 2px 0"
_BIDI = "unicode-bidi:isolate;overflow-wrap:anywhere;white-space:pre-wrap"


def card_text(row: Record, card: Record, *, contexts: int = 4) -> str:
    """Return explanation, scores and some passages, from the strongest to the weakest; **strong** tokens are marked."""
    lines = [f"latent {row['latent']}: {row['explanation_it'] or row['status'] or 'dead'}"]
    lines.append(f"density {100 * row['density']:.2f} %, max {row['max']:.2f}, {row['n_active']:,} active tokens")
    for score in card["scores"]:
        if score["metric"] == "balanced_accuracy" and score["value"] is not None:
            interval = "" if score["lo"] is None else f" [{score['lo']:.2f}, {score['hi']:.2f}]"
            test = f"{score['scorer']} ({score['negatives']}, {score['judge']})"
            lines.append(f"{score['explainer']:17} {test:38} {score['value']:.2f}{interval}")
    if card["promoted"]:
        lines.append("promotes   " + ", ".join(f"«{item['token'].strip()}»" for item in card["promoted"][:5]))
    passages = _passages(card)
    for context in passages[:: max(1, len(passages) // contexts)][:contexts]:
        text = "".join(_strong(piece, value, row["max"]) for piece, value in context["segments"])
        lines.append(f"{context['max']:7.2f}  {' '.join(text.split())}")
    return "\n".join(lines)


def list_html(run: Record, columns: dict[str, list[Any]]) -> str:
    """Return the latents with the best scores (the densest where there are none) as a table."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: (-(row["detection"] or 0.0), -row["n_active"], row["latent"]))
    cells = [
        (
            _text(str(row["latent"])),
            _text(row["explanation_it"] or row["status"]),
            _number(row["detection"]),
            f"{100 * row['density']:.2g} %",
            _text(" ".join(f"«{token.strip()}»" for token in row["top_tokens"])),
        )
        for row in rows[:N_ROWS]
    ]
    facts = f"{run['d_sae']:,} latenti, {run['n_tokens']:,} token di {_text(run['corpus'])}"
    table = _table(cells, ("latente", "spiegazione", "detection", "densità", "token"))
    return _box(f"<h3>{_text(run['title'])}</h3><p>{facts}</p>", table)


def card_html(row: Record, card: Record) -> str:
    """Return one latent: explanations, scores, what it promotes, its strongest passages."""
    parts = [f"<h3>Latente {row['latent']}</h3>"]
    parts.append(f"<p>{_text(row['explanation_it'] or row['status'] or 'morto: mai attivo in questa cache')}</p>")
    if row["explanation_en"]:
        parts.append(f'<p lang="en"><i>{_text(row["explanation_en"])}</i></p>')
    parts.append(
        f"<p>densità {100 * row['density']:.2g} % · massimo {row['max']:.3g} · {row['n_active']:,} token · "
        f"detection {_number(row['detection'])} · guadagno sul solo token {_number(row['gain'])}</p>"
    )
    for name, items in (("Promuove", card["promoted"]), ("Sopprime", card["suppressed"])):
        if items:
            parts.append(f"<p>{name}: {', '.join(_text(item['token'].strip()) for item in items[:8])}</p>")
    contexts = _passages(card)[:N_CONTEXTS]
    rows = [(f"{context['max']:.2f}", _marked(context["segments"], row["max"])) for context in contexts]
    return _box(*parts, _table(rows) if rows else "")


def _passages(card: Record) -> list[Record]:
    return [context for group in card["groups"] for context in group["contexts"]]


def _strong(piece: str, value: float, largest: float) -> str:
    word = piece.strip()
    return piece.replace(word, f"**{word}**", 1) if word and largest and value >= STRONG * largest else piece


def _box(*parts: str) -> str:
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


def _table(rows: list[tuple[str, ...]], heads: tuple[str, ...] = ()) -> str:
    """Return a table of cells that are HTML already."""

    def line(cells: tuple[str, ...], kind: str) -> str:
        return "<tr>" + "".join(f'<{kind} style="{_CELL}">{cell}</{kind}>' for cell in cells) + "</tr>"

    head = f"<thead>{line(heads, 'th')}</thead>" if heads else ""
    return f"<table>{head}<tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _text(text: str) -> str:
    """Return a text as HTML that stays one: escaped, its direction isolated, cut where it is endless."""
    return _marked([(text, 0.0)], 0.0)


def _marked(segments: list[tuple[str, float]], largest: float) -> str:
    """Return a passage as HTML, the stronger a piece the darker; escaped and cut as any text.

    Control characters become their pictures (U+2400), half surrogates a question mark.
    """
    parts, length = [], 0
    for text, activation in segments:
        cut = text[: max(0, MAX_LETTERS - length)]
        shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in cut)
        part = escape(shown.encode("utf-8", "replace").decode())
        length += len(text)
        if activation > 0 and part:
            tint = f"background:rgba(11,107,80,{0.15 + 0.45 * (activation / largest if largest else 0.0):.2f})"
            part = f'<mark title="{activation:.3g}" style="{tint};color:inherit">{part}</mark>'
        parts.append(part)
    return f'<bdi style="{_BIDI}">{"".join(parts)}{"…" if length > MAX_LETTERS else ""}</bdi>'


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
