"""The browser in a notebook: a widget with live work where anywidget is, plain HTML everywhere.

from sae_italian.browser.widget import show
show("quickstart/cache", latent=12)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError
from sae_italian.browser.bundle import module, notebook_style
from sae_italian.browser.compare import Other, open_other
from sae_italian.browser.live import Live, in_both, open_with_live
from sae_italian.browser.llm import Endpoint
from sae_italian.browser.plain import card_html, list_html
from sae_italian.browser.report import open_source
from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache
from sae_italian.models import load_tokenizer


def show(
    cache_path: str | Path,
    latent: int | None = None,
    *,
    live: bool = True,
    endpoint: Endpoint | None = None,
    plain: bool = False,
    compare: str | Path | None = None,
    **weights: Any,
) -> Any:
    """Return what a notebook shows of a cache: the list of its latents, or the card of one.

    A widget where anywidget is installed (the extra `notebook`), else, or with `plain`, a page of HTML without scripts.
    `live` loads the cache's SAE and model for live work, where they are at hand; `weights` are `sae` and `model` where
    the caller holds them already. `compare` is the cache of another SAE, whose best match stands below a latent's card.
    Raises: UsageError when there is no such cache or latent, or the two SAEs cannot be compared.
    """
    opened = FeatureCache.open(cache_path)
    if latent is not None:
        opened.range_of(latent)
    model = weights.get("model")
    tokenizer = load_tokenizer(opened.manifest.model) if model is None else model.tokenizer
    if plain or not has_anywidget():
        return Plain(open_source(opened, tokenizer), latent)
    if live:
        source, working = open_with_live(opened, tokenizer, endpoint=endpoint, **weights)
    else:
        source, working = open_source(opened, tokenizer, decoder=compare is not None, **weights), None
    other = None if compare is None else open_other(source, Path(compare), model=getattr(working, "model", model))
    return widget_class()(source, working, latent, other)


def has_anywidget() -> bool:
    """Return whether anywidget can be imported."""
    from importlib.util import find_spec

    return find_spec("anywidget") is not None


class Plain:
    """A latent's card, or the strongest explanations of a cache, as HTML without scripts."""

    def __init__(self, source: LatentSource, latent: int | None = None):
        self.source, self.latent = source, latent

    def _repr_html_(self) -> str:
        if self.latent is None:
            return list_html(self.source.run(), self.source.rows())
        return card_html(self.source.row(self.latent), self.source.card(self.latent))


def answer(source: LatentSource, live: Live | None, name: Any, argument: Any, other: Other | None = None) -> Any:
    """Return the answer to one message of the widget. Raises: UsageError for a message that makes no sense."""
    if other is not None and name == "matches":
        return other.matches
    if other is not None and str(name).startswith("other."):
        return answer(other.source, None, str(name).removeprefix("other."), argument)
    if name == "run":
        return source.run()
    if name == "rows":
        source.update()
        return source.rows()
    if name in ("card", "wide"):
        if not isinstance(argument, int) or isinstance(argument, bool):
            raise UsageError(f"{name} takes the number of a latent.")
        source.update()
        return source.card(argument) if name == "card" else source.wide(argument)
    if live is None:
        raise UsageError(f"{str(name)[:40]!r} is unknown here: there is no live work without the SAE and its model.")
    return live.call(str(name), argument)


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

        _esm = module("widget.js")
        _css = notebook_style()
        latent = traitlets.Int(-1).tag(sync=True)
        has_live = traitlets.Bool(False).tag(sync=True)
        has_llm = traitlets.Bool(False).tag(sync=True)
        other = traitlets.Unicode("").tag(sync=True)
        permalink = traitlets.Unicode("").tag(sync=True)

        def __init__(self, source: LatentSource, live: Live | None, latent: int | None, compared: Other | None = None):
            self.source, self.live, self.compared = source, live, compared
            path = str(source.cache.folder)
            super().__init__(
                latent=-1 if latent is None else latent,
                has_live=live is not None,
                has_llm=live is not None and live.endpoint is not None,
                other=compared.name if compared else "",
                permalink=f"show({path!r}, latent=LATENT)",
            )
            self.on_msg(self._asked)

        def _asked(self, _: Any, content: Any, __: Any) -> None:
            """Answer a message; whatever goes wrong becomes one line in the page, never a dead widget."""
            if not isinstance(content, dict) or "id" not in content:
                return
            try:
                value = answer(self.source, self.live, content.get("name"), content.get("argument"), self.compared)
                reply = {"id": content["id"], "value": _whole(value)}
            except UsageError as error:
                reply = {"id": content["id"], "error": " ".join(str(error).split()), **in_both(error)}
            except Exception as error:  # a defect of ours: the kernel goes on
                reply = {"id": content["id"], "error": f"a defect of ours: {type(error).__name__}: {error}"}
            self.send(reply)

        def _repr_mimebundle_(self, **kwargs: Any) -> Any:
            """Return the widget, and beside it plain HTML for whoever shows the notebook without a kernel."""
            found = super()._repr_mimebundle_(**kwargs)
            data, metadata = found if isinstance(found, tuple) else (found or {}, {})
            html = Plain(self.source, None if self.latent < 0 else self.latent)._repr_html_()
            return {**data, "text/html": html}, metadata

    return LatentBrowser


def _whole(value: Any) -> Any:
    """Return plain JSON without half surrogate pairs, which no message can carry."""
    import json

    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.loads(text.encode("utf-8", "replace"))
