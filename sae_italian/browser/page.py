"""The page, and what the list of latents and the table of metrics show.

It is one script and one style sheet, each joined from the files of `static/`, for a folder, a server, a notebook. Pages on
`file://` may load scripts but no modules, and a notebook hands a front end as one text. So the files of `static/` are plain
scripts that share one scope: joined in the order below, no name may be declared twice. Before them stand the words of
`base/labels.yaml` and the columns of the list.

To add a column: a row of COLUMNS here, and its words in `base/labels.yaml` under `column` (docs/extending.md).
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from sae_italian.autointerp.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.work import TITLE, WHOLE
from sae_italian.base.labels import label, page_labels
from sae_italian.base.report import table

SCRIPTS = (
    *("base", "select", "route", "marks", "charts", "contexts", "overview", "list", "scores", "card"),
    *("scatter", "compare", "home", "main"),
)
HOSTS = {"disk": ("disk",), "served": ("live", "remote", "served"), "widget": ("live", "remote", "widget")}
STYLES = ("base.css", "views.css", "live.css")
# What a notebook's rules may reach: every element that the page uses but for its own blocks and spans.
_RESET = (
    "a, b, button, caption, code, dd, details, dl, dt, fieldset, figcaption, figure, h1, h2, h3, h4, input, kbd, label, "
    "legend, li, mark, ol, p, pre, select, small, strong, summary, table, tbody, td, textarea, th, thead, tr, ul"
)


def static_text(name: str) -> str:
    """Return a file of `static/`. Raises: FileNotFoundError."""
    return (resources.files("sae_italian.browser") / "static" / name).read_text(encoding="utf-8")


def template(text: str, names: dict[str, Any] | None = None) -> jinja2.Template:
    """Return a template of HTML: what is put into it is escaped, a name it lacks is an error; `names`: of every use of it."""
    how: Any = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(autoescape=True, **how).from_string(text, names)


@cache
def joined(host: str) -> str:
    """Return the scripts of a host (disk, served or widget), to be put into a scope of their own."""
    shown = {name: {"show": column.show, "range": column.range} for name, column in COLUMNS.items() if column.show}
    data = {"LABELS": page_labels(), "COLUMNS": shown}
    head = "".join(f"const {name} = {json.dumps(value, ensure_ascii=False)};\n" for name, value in data.items())
    return head + "\n".join(static_text(f"{name}.js") for name in (*SCRIPTS, *HOSTS[host]))


def script(host: str) -> str:
    """Return the page's classic script."""
    return f'"use strict";\n(() => {{\n{joined(host)}}})();\n'


def module() -> str:
    """Return the notebook's ES module, as anywidget wants it."""
    return f"{joined('widget')}export default {{ render }};\n"


@cache
def style() -> str:
    """Return the style sheet, every rule of it under `.sae-italian`."""
    return "\n".join(static_text(name) for name in STYLES)


def notebook_style() -> str:
    """Return the style sheet for an element inside a notebook's page, whose own rules reach into what cells show.

    JupyterLab floats every `dt` at a fifth of the width, takes the line from under links and more: at twice our weight
    all of that goes back to what the browser does by itself, and at three times stand our own rules.
    """
    root = ".sae-italian"
    return f"{2 * root} :is({_RESET}) {{ all: revert; }}\n" + style().replace(root, 3 * root)


def page(run: Mapping[str, Any], *, policy: str = "") -> str:
    """Return the page with the facts of a run, escaped; `policy` is a meta element."""
    facts = {key: html.escape(str(run[key])) for key in ("title", "model", "sae", "corpus")}
    return Template(static_text("page.html")).substitute(facts, policy=policy)


# --- the columns of the list of latents -------------------------------------------------------------------------------


if TYPE_CHECKING:
    from sae_italian.browser.source import LatentSource

Record = dict[str, Any]  # of the page, plain JSON: None is "not measured"; tests/browser/records.yaml has them all
LABEL_SHOWN = 0.5  # F1 from which a latent is said to detect a label
TOKENS_SHOWN = 5


class Column(NamedTuple):
    """One field of a latent's row: its value, and whether and how the list shows it as a column."""

    value: Callable[[LatentSource, int], Any]
    show: str = ""
    """integer, density, activation, fixed, signed or score; empty: the row needs it but has no column of its own."""
    range: bool = False
    """Whether the list can be narrowed to a range of it."""


def _gain(source: LatentSource, latent: int) -> float | None:
    own, lookup = (source.score(explainer, "detection", latent) for explainer in (EXPLAINER, LOOKUP))
    return None if own is None or lookup is None else own - lookup


def _kind(source: LatentSource, latent: int) -> str:
    return (source.explained(EXPLAINER, latent).rule or {}).get("family", "")


def _detected(source: LatentSource, latent: int) -> list[str]:
    return [row["label"] for row in source.labels.get(latent, []) if row["f1"] >= LABEL_SHOWN]


COLUMNS: dict[str, Column] = {
    "latent": Column(lambda _, i: i, "integer"),  # 0 to d_sae - 1, in order
    # share of tokens on which it is active, 0 to 1; the largest activation seen, 0 when dead; tokens on which it is active
    "density": Column(lambda s, i: float(s.stats["density"][i]), "density", range=True),
    "max": Column(lambda s, i: float(s.stats["max"][i]), "activation", range=True),
    "n_active": Column(lambda s, i: int(s.stats["count"][i])),
    "sample": Column(lambda s, i: s.sample(i)),  # its strongest passage, what fires marked (contexts.py)
    # the rule's, which the scores are of; an LLM's, empty without one
    "title_it": Column(lambda s, i: s.explained(EXPLAINER, i).title("it")),  # empty in an older store
    "title_en": Column(lambda s, i: s.explained(EXPLAINER, i).title("en")),
    "title_detection": Column(lambda s, i: s.score(EXPLAINER, TITLE, i)),  # its own score, as `detection`
    "whole_detection": Column(lambda s, i: s.score(EXPLAINER, WHOLE, i)),  # of the rule as it was fitted
    "explanation_it": Column(lambda s, i: s.explained(EXPLAINER, i).text_it),
    "explanation_en": Column(lambda s, i: s.explained(EXPLAINER, i).text_en),
    "llm_it": Column(lambda s, i: getattr(s.llm_explanation(i), "text_it", "")),
    "llm_en": Column(lambda s, i: getattr(s.llm_explanation(i), "text_en", "")),
    "kind": Column(_kind),  # token, previous, bigram, context, ...; empty when unexplained
    # balanced accuracy, 0 to 1, chance 0.5, and its 95 % interval
    "detection": Column(lambda s, i: s.score(EXPLAINER, "detection", i), "score", range=True),
    "detection_lo": Column(lambda s, i: s.score(EXPLAINER, "detection", i, "lo")),
    "detection_hi": Column(lambda s, i: s.score(EXPLAINER, "detection", i, "hi")),
    "fuzzing": Column(lambda s, i: s.score(EXPLAINER, "fuzzing", i), "fixed"),
    # detection minus that of the token lookup, -1 to 1
    "gain": Column(_gain, "signed", range=True),
    "top_tokens": Column(lambda s, i: [s.strings[t] for t in s.stats["token_ids"][i][:TOKENS_SHOWN]]),
    # labels that this latent detects
    "gold": Column(_detected),
    "dead": Column(lambda s, i: not s.stats["count"][i]),
    "x": Column(lambda s, i: s.place(i, 0)),  # on the map; None without the decoder
    "y": Column(lambda s, i: s.place(i, 1)),
    # why there is no explanation
    "status": Column(lambda s, i: s.explained(EXPLAINER, i).status.removeprefix("ok")),
}


# --- the metrics of a run ---------------------------------------------------------------------------------------------

# The number's place in the run's results, and its label, which ends with its name on the page.
_TABLES = {
    "metrics": {
        **{f"card.{name}": f"card.{name}" for name in ("l0", "explained_variance", "explained_variance_uncentred")},
        "card.ce_loss_recovered": "card.ce_loss_recovered",
        "card.dead": "metrics.dead",
        **{f"autointerp.{name}": f"metrics.{name}" for name in ("share_detected", "detection", "fuzzing")},
    },
    "controls": {
        **{
            f"autointerp.{name}": f"controls.{name}"
            for name in ("shuffled_detection", "whole_detection", "lookup_share_detected", "gain_over_lookup")
        },
        **{f"random.{name}": f"controls.random_{name}" for name in ("share_detected", "detection")},
    },
}
_SHARES = ("explained_variance", "explained_variance_uncentred", "ce_loss_recovered", "dead", "share_detected")
_NOTES = {
    "dead": ("su {n_tokens:_} token", "in {n_tokens:_} tokens"),
    "share_detected": ("{n_scored:_} valutati di {n_latents:_}", "{n_scored:_} scored of {n_latents:_}"),
    "shuffled_detection": ("a caso si ottiene 0,5", "chance is 0.5"),
}


def records(results: dict[str, Any], which: str) -> list[Record]:
    """Return the `metrics` or `controls` of a run as records; numbers that a run does not have are left out.

    `results` holds the parts `card`, `autointerp`, `random` (dicts of {value, lo, hi}) and counts for the notes.
    """
    found, card, auto = [], results.get("card") or {}, results.get("autointerp") or {}
    counts = {"n_scored": auto.get("n_explained"), **auto, "n_tokens": card.get("n_tokens")}
    for place, words in _TABLES[which].items():
        part, key = place.split(".")
        estimate = (results.get(part) or {}).get(key)
        if not estimate or estimate["value"] is None:
            continue
        name = words.split(".")[1]
        scale, unit = (100, "%") if name.endswith(_SHARES) else (1, "")
        ends = {end: None if estimate[end] is None else estimate[end] * scale for end in ("value", "lo", "hi")}
        note_it, note_en = (note.format(**counts) for note in _NOTES.get(name, ("", "")))
        notes = {"note_it": note_it.replace("_", "."), "note_en": note_en.replace("_", ",")}
        labels = {f"label_{language}": label(words, language) for language in ("it", "en")}
        found.append({"name": name, **ends, **labels, "unit": unit, **notes})
    return found


def text_table(metrics: Sequence[Record], extra: Sequence[tuple[str, ...]] = ()) -> str:
    """Return a Markdown table of metrics with their intervals, in English, then rows of a name, a value and an interval."""
    rows: list[tuple[str, ...]] = []
    for metric in metrics:
        digits, unit = (1, " %") if metric["unit"] else (3, "")
        note = f" ({metric['note_en']})" if metric["note_en"] else ""
        interval = "" if metric["lo"] is None else f"{metric['lo']:.{digits}f} to {metric['hi']:.{digits}f}"
        rows.append((metric["label_en"] + note, f"{metric['value']:.{digits}f}{unit}", interval))
    return table(" | value | 95 % interval", [*rows, *extra])
