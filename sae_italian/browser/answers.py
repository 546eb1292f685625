"""What a page may ask of one cache, by name: its records, and live work. The server and the notebook answer alike.

run                      the run, the live work there is, and the name of an SAE to compare with
rows                     the list of latents by column
card, wide               one latent; its passages, each as wide as its window
matches, other/...       the matches with an SAE to compare with, and its own run, rows, cards
tokens, steer, ablate, explain      live work (live.py)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_italian.base.errors import UsageError
from sae_italian.browser.schema import check, check_card, check_rows

if TYPE_CHECKING:
    from sae_italian.browser.live import Live
    from sae_italian.browser.opening import Other
    from sae_italian.browser.source import LatentSource

WORKS = ("tokens", "steer", "ablate", "explain")


class Refused(UsageError):
    """What is not answered: why, in English and Italian, and the HTTP status."""

    def __init__(self, english: str, italian: str, status: int = 422):
        super().__init__(english)
        self.italian, self.status = italian, status


def in_both(error: Exception | str) -> dict[str, str]:
    """Return what to say of an error on the page, a line in each language; what has no Italian is said in English."""
    italian = getattr(error, "italian", str(error))
    return {"error_it": " ".join(italian.split())[:1000], "error_en": " ".join(str(error).split())[:1000]}


class PageAnswers:
    """Call it with a name and an argument; the answer is plain JSON.

    Raises: Refused for what is not there, and as live work itself.
    """

    def __init__(self, source: LatentSource, live: Live | None = None, other: Other | None = None):
        self.source, self.live, self.other = source, live, other

    def __call__(self, name: Any, argument: Any = None) -> Any:
        name, source = str(name), self.source
        if name in WORKS:
            if self.live is None:
                raise Refused(
                    "No live work: this cache's SAE or its model is not on this machine.",
                    "Nessun lavoro dal vivo: la SAE o il modello di questa cache non sono su questa macchina.",
                    404,
                )
            return self.live.call(name, argument)
        if name == "run":
            live = None if self.live is None else {"works": list(WORKS), "llm": self.live.llm is not None}
            return {"run": check("run", source.run()), "live": live, "compare": self.other.name if self.other else None}
        if self.other is not None and name.startswith("other/"):
            return PageAnswers(self.other.source)(name.removeprefix("other/"), argument)
        if self.other is not None and name == "matches":
            return self.other.matches
        source.update()
        if name == "rows":
            return check_rows(source.rows())
        if name == "card":
            return check_card(source.card(self._latent(argument)))
        if name == "wide":
            return check("[group]", source.wide(self._latent(argument)))
        raise Refused(f"There is no {name[:40]!r} here.", f"Qui non c'è {name[:40]!r}.", 404)

    def _latent(self, given: Any) -> int:
        if not isinstance(given, int) or isinstance(given, bool) or not 0 <= given < self.source.d_sae:
            raise Refused(f"There is no latent {str(given)[:40]}.", f"Non c'è il latente {str(given)[:40]}.", 404)
        return given
