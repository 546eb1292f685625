"""The browser in a notebook: a widget with live work where anywidget is, plain HTML everywhere.

from sae_italian.browser import show
show("quickstart/cache", latent=12)
"""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_italian.autointerp.llm.settings import LLMSettings
from sae_italian.base.errors import UsageError
from sae_italian.browser.live import in_both
from sae_italian.browser.opening import PageAnswers, open_pages
from sae_italian.browser.page import module, notebook_style
from sae_italian.browser.plain import card_html, list_html
from sae_italian.browser.source import LatentSource
from sae_italian.cache import FeatureCache


def show(
    cache_path: str | Path,
    latent: int | None = None,
    *,
    live: bool = True,
    llm: LLMSettings | None = None,
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
            """Return the widget, and beside it plain HTML for whoever shows the notebook without a kernel."""
            found = super()._repr_mimebundle_(**kwargs)
            data, metadata = found if isinstance(found, tuple) else (found or {}, {})
            html = Plain(self.answers.source, None if self.latent < 0 else self.latent)._repr_html_()
            return {**data, "text/html": html}, metadata

    return LatentBrowser
