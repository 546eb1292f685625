"""The browser in a notebook: a widget with live work where anywidget is, plain HTML everywhere; a card in a terminal.

from sae_italian.browser import show
show("quickstart/cache", latent=12)
"""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from sae_italian.autointerp.llm import LLMSettings
from sae_italian.base.errors import UsageError
from sae_italian.browser.live import in_both
from sae_italian.browser.opening import PageAnswers, open_pages
from sae_italian.browser.page import Record, module, notebook_style, template
from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache

N_ROWS, N_CONTEXTS, MAX_LETTERS = 50, 8, 400
STRONG = 0.5  # share of the latent's maximum from which a token is marked in a terminal


def show(
    cache_path: str | Path,
    latent: int | None = None,
    *,
    live: bool = True,
    llm: LLMSettings | None = None,
    plain: bool = False,
    compare: str | Path | None = None,
    sae: Any = None,
    model: Any = None,
) -> Any:
    """Return what a notebook shows of a cache: the list of its latents, or the card of one.

    A widget where anywidget is installed (the extra `notebook`), else, or with `plain`, a page of HTML without scripts.
    `live` loads the cache's SAE and model for live work, where they are at hand, unless the caller has given the `sae` or
    the `model` that it holds already. `compare` is the cache of another SAE, whose best match stands below a latent's card.
    Raises: UsageError when there is no such cache or latent, the SAE given is not the cache's, or two cannot be compared.
    """
    weights = {name: given for name, given in (("sae", sae), ("model", model)) if given is not None}
    if latent is not None:
        FeatureCache.open(cache_path).range_of(latent)
    if plain or find_spec("anywidget") is None:
        return Plain(open_pages(cache_path, weights=weights).source, latent)
    given = weights if weights or not (live or compare) else None
    return widget_class()(open_pages(cache_path, weights=given, live=live, llm=llm, compare=compare), latent)


class Plain:
    """A latent's card, or the strongest explanations of a cache, as HTML without scripts."""

    def __init__(self, source: LatentSource, latent: int | None = None):
        self.source, self.latent = source, latent

    def _repr_html_(self) -> str:
        if self.latent is None:
            return list_html(self.source.run(), self.source.rows())
        return card_html(self.source.row(self.latent), self.source.card(self.latent))


@cache
def widget_class() -> Any:
    """Return the widget's class. Raises: UsageError without anywidget."""
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise UsageError("the widget needs anywidget; it comes with pip install 'sae-italian[notebook]'.") from None

    class LatentBrowser(anywidget.AnyWidget):  # pyright: ignore[reportUntypedBaseClass]
        """The page, its records and its live work behind one comm."""

        _esm = module()
        _css = notebook_style()
        latent = traitlets.Int(-1).tag(sync=True)
        permalink = traitlets.Unicode("").tag(sync=True)

        def __init__(self, answers: PageAnswers, latent: int | None):
            self.answers = answers
            path = str(answers.source.cache.folder)
            super().__init__(latent=-1 if latent is None else latent, permalink=f"show({path!r}, latent=LATENT)")
            self.on_msg(self._asked)

        def _asked(self, _: Any, content: Any, __: Any) -> None:
            """Answer a message; whatever goes wrong becomes one line in the page, never a dead widget."""
            if not isinstance(content, dict) or "id" not in content:
                return
            try:
                value = self.answers(content.get("name"), content.get("argument"))
                text = json.dumps(value, ensure_ascii=False, allow_nan=False)
                # no message can carry half a surrogate pair
                reply = {"id": content["id"], "value": json.loads(text.encode("utf-8", "replace"))}
            except UsageError as error:
                reply = {"id": content["id"], "error": " ".join(str(error).split()), **in_both(error)}
            except Exception as error:  # a defect of ours: the kernel goes on
                reply = {"id": content["id"], "error": f"a defect of ours: {type(error).__name__}: {error}"}
            self.send(reply)

        def _repr_mimebundle_(self, **kwargs: Any) -> Any:
            """Return the widget and beside it plain HTML for whoever shows the notebook without a kernel."""
            found = super()._repr_mimebundle_(**kwargs)
            data, metadata = found if isinstance(found, tuple) else (found or {}, {})
            html = Plain(self.answers.source, None if self.latent < 0 else self.latent)._repr_html_()
            return {**data, "text/html": html}, metadata

    return LatentBrowser


# --- a card and a list without scripts ------------------------------------------------------------------------------------


def card_text(row: Record, card: Record, *, contexts: int = 4) -> str:
    """Return explanation, scores and some passages, from the strongest to the weakest; **strong** tokens are marked."""
    lines = [
        f"latent {row['latent']}: {row['explanation_it'] or row['status'] or 'dead'}",
        f"density {100 * row['density']:.2f} %, max {row['max']:.2f}, {row['n_active']:,} active tokens",
    ]
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


def _passages(card: Record) -> list[Record]:
    return [context for group in card["groups"] for context in group["contexts"]]


def _strong(piece: str, value: float, largest: float) -> str:
    word = piece.strip()
    return piece.replace(word, f"**{word}**", 1) if word and value >= STRONG * largest else piece


def _marked(segments: list[tuple[str, float]], largest: float) -> Markup:
    """Return a passage as HTML, the stronger a piece the darker; its direction isolated, cut where it is endless.

    Control characters become their pictures (U+2400), half surrogates a question mark.
    """
    parts, length = [], 0
    for text, activation in segments:
        cut = text[: max(0, MAX_LETTERS - length)]
        shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in cut)
        part = escape(shown.encode("utf-8", "replace").decode())
        length += len(text)
        if activation > 0 and part:
            tint = f"background:rgba(11,107,80,{0.15 + 0.45 * activation / largest:.2f})"
            part = Markup('<mark title="{:.3g}" style="{};color:inherit">{}</mark>').format(activation, tint, part)
        parts.append(part)
    style = "unicode-bidi:isolate;overflow-wrap:anywhere;white-space:pre-wrap"
    return Markup('<bdi style="{}">{}{}</bdi>').format(style, Markup().join(parts), "…" * (length > MAX_LETTERS))


# a notebook that is only read has no style sheet of ours
_USED = {
    "box": "font:14px/1.5 system-ui,sans-serif;max-width:60rem",
    "cell": "text-align:left;vertical-align:top;padding:2px 14px 2px 0",
    "marked": _marked,
    "text": lambda text: _marked([(text, 0.0)], 0.0),
    "number": lambda value: "–" if value is None else f"{value:.2f}",
}
_LIST = template(
    """<div style="{{ box }}"><h3>{{ text(run.title) }}</h3>
<p>{{ "{:,}".format(run.d_sae) }} latenti, {{ "{:,}".format(run.n_tokens) }} token di {{ text(run.corpus) }}</p>
<table><thead><tr>
{% for head in ("latente", "spiegazione", "detection", "densità", "token") %}
<th style="{{ cell }}">{{ head }}</th>
{% endfor %}
</tr></thead><tbody>
{% for row in rows %}
<tr><td style="{{ cell }}">{{ row.latent }}</td>
<td style="{{ cell }}">{{ text(row.explanation_it or row.status) }}</td>
<td style="{{ cell }}">{{ number(row.detection) }}</td>
<td style="{{ cell }}">{{ "%.2g" % (100 * row.density) }} %</td>
<td style="{{ cell }}">{{ text("«" ~ row.top_tokens | map("trim") | join("» «") ~ "»") if row.top_tokens }}</td></tr>
{% endfor %}
</tbody></table></div>""",
    _USED,
)
_CARD = template(
    """<div style="{{ box }}"><h3>Latente {{ row.latent }}</h3>
<p>{{ text(row.explanation_it or row.status or "morto: mai attivo in questa cache") }}</p>
{% if row.explanation_en %}
<p lang="en"><i>{{ text(row.explanation_en) }}</i></p>
{% endif %}
<p>densità {{ "%.2g" % (100 * row.density) }} % · massimo {{ "%.3g" % row.max }} ·
{{ "{:,}".format(row.n_active) }} token · detection {{ number(row.detection) }} ·
guadagno sul solo token {{ number(row.gain) }}</p>
{% for name, tokens in (("Promuove", card.promoted), ("Sopprime", card.suppressed)) if tokens %}
<p>{{ name }}: {% for item in tokens[:8] %}{{ text(item.token.strip()) }}{{ ", " if not loop.last }}{% endfor %}</p>
{% endfor %}
<table><tbody>
{% for context in contexts %}
<tr><td style="{{ cell }}">{{ "%.2f" % context.max }}</td>
<td style="{{ cell }}">{{ marked(context.segments, row.max) }}</td></tr>
{% endfor %}
</tbody></table></div>""",
    _USED,
)


def list_html(run: Record, columns: dict[str, list[Any]]) -> str:
    """Return the latents with the best scores (the densest where there are none) as a table."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows.sort(key=lambda row: (-(row["detection"] or 0.0), -row["n_active"], row["latent"]))
    return _LIST.render(run=run, rows=rows[:N_ROWS])


def card_html(row: Record, card: Record) -> str:
    """Return one latent: explanations, scores, what it promotes, its strongest passages."""
    return _CARD.render(row=row, card=card, contexts=_passages(card)[:N_CONTEXTS])
