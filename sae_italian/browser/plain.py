"""A card and a list as HTML without scripts: for a notebook without the widget, and for a notebook that is only read."""

from __future__ import annotations

from html import escape
from typing import Any

from sae_italian.browser.schema import CardRecord, RowRecord, RunRecord

N_ROWS, N_CONTEXTS, MAX_LETTERS = 50, 8, 400
_BOX = "font:14px/1.5 system-ui,sans-serif;max-width:60rem"
_CELL = "text-align:left;vertical-align:top;padding:2px 14px 2px 0"
_BIDI = "unicode-bidi:isolate;overflow-wrap:anywhere;white-space:pre-wrap"


def list_html(run: RunRecord, columns: dict[str, list[Any]], n: int = N_ROWS) -> str:
    """Return the latents with the best scores (the densest where there are none) as a table."""
    order = sorted(
        range(len(columns["latent"])),
        key=lambda i: (-(columns["detection"][i] or 0.0), -columns["n_active"][i], columns["latent"][i]),
    )[:n]
    heads = ("latente", "spiegazione", "detection", "densità", "token")
    rows = [
        (
            columns["latent"][i],
            columns["explanation_it"][i] or columns["status"][i],
            _number(columns["detection"][i], 2),
            f"{100 * columns['density'][i]:.2g} %",
            " ".join(f"«{token.strip()}»" for token in columns["top_tokens"][i][:5]),
        )
        for i in order
    ]
    head = f"<h3>{_text(run['title'])}</h3><p>{run['d_sae']:,} latenti, {run['n_tokens']:,} token di {_text(run['corpus'])}</p>"
    return _box(head + _table(heads, rows))


def card_html(row: RowRecord, card: CardRecord) -> str:
    """Return one latent: explanations, scores, what it promotes, its strongest passages."""
    parts = [f"<h3>Latente {row['latent']}</h3>"]
    parts.append(f"<p>{_text(row['explanation_it'] or row['status'] or 'morto: mai attivo in questa cache')}</p>")
    if row["explanation_en"]:
        parts.append(f'<p lang="en"><i>{_text(row["explanation_en"])}</i></p>')
    facts = [
        f"densità {100 * row['density']:.2g} %",
        f"massimo {row['max']:.3g}",
        f"{row['n_active']:,} token",
        f"detection {_number(row['detection'], 2)}",
        f"guadagno sul solo token {_number(row['gain'], 2)}",
    ]
    parts.append(f"<p>{' · '.join(facts)}</p>")
    for name, items in (("Promuove", card["promoted"]), ("Sopprime", card["suppressed"])):
        if items:
            parts.append(f"<p>{name}: {', '.join(_text(item['token'].strip()) for item in items[:8])}</p>")
    contexts = [context for group in card["groups"] for context in group["contexts"]][:N_CONTEXTS]
    rows = [(f"{context['max']:.2f}", _marked(context["segments"], row["max"])) for context in contexts]
    if rows:
        cells = "".join(
            f'<tr><td style="{_CELL}">{value}</td><td style="{_CELL}">{text}</td></tr>' for value, text in rows
        )
        parts.append(f"<table>{cells}</table>")
    return _box("".join(parts))


def _box(content: str) -> str:
    return f'<div style="{_BOX}">{content}</div>'


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in heads)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{_text(str(cell))}</td>' for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(text: str) -> str:
    """Return a text as HTML that stays one: escaped, its direction isolated, cut where it is endless."""
    return f'<bdi style="{_BIDI}">{_escaped(text if len(text) <= MAX_LETTERS else text[:MAX_LETTERS] + "…")}</bdi>'


def _escaped(text: str) -> str:
    """Return escaped text with control characters as their pictures (U+2400) and half surrogates replaced."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return escape(shown.encode("utf-8", "replace").decode())


def _marked(segments: list[tuple[str, float]], largest: float) -> str:
    pieces, length = [], 0
    for text, activation in segments:
        part = _escaped(text[: max(0, MAX_LETTERS - length)])
        length += len(text)
        heat = activation / largest if largest else 0.0
        if activation > 0 and part:
            part = f'<mark title="{activation:.3g}" style="background:rgba(11,107,80,{0.15 + 0.45 * heat:.2f});color:inherit">{part}</mark>'
        pieces.append(part)
    return f'<bdi style="{_BIDI}">{"".join(pieces)}{"…" if length > MAX_LETTERS else ""}</bdi>'


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
