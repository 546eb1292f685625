"""Explain one latent while somebody waits, and keep it beside a run's work, never among it.

What a reader happened to ask about is no random draw: no summary, no control and no resumed run may count it. So an
explanation made on demand is kept in the same store under its explainer's name with `@now` behind it, says in its notes
when and how it was made, and gives way to the next one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae_italian.autointerp.explainers.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.run import AutointerpConfig, Work, cache_identity, stored_config
from sae_italian.autointerp.store import NOW, Explanation, Store
from sae_italian.base.errors import SaeItalianError
from sae_italian.base.storage import utc_now


def config_of(path: Path) -> AutointerpConfig:
    """Return a store's settings, those of any latent, so that what is made now compares with the run; else the defaults."""
    try:
        with Store(path, {}, read_only=True) as store:
            return replace(stored_config(store), latents=None)
    except SaeItalianError:
        return AutointerpConfig()


def keep(path: Path, work: Work, found: Sequence[Explanation]) -> str:
    """Keep explanations of one latent made on demand, a rule with its scores; return why that was not possible, or "".

    `found` are a rule, the token lookup, and others. Those without a text, and those that a run's say word for word
    already, are not kept again.
    """
    new = {explanation.explainer: explanation for explanation in found if explanation.status == "ok"}
    if not new:
        return ""
    settings = {name: value for name, value in asdict(work.config).items() if name != "latents"}
    made = {"when": utc_now(), "settings": settings}
    try:
        with Store(path, cache_identity(work.cache)) as store:
            known = store.explanations_of(found[0].latent)
            fresh = {name for name, explanation in new.items() if not same(known.get(name), explanation)}
            # the lookup is only there for a rule to be set against
            fresh = fresh | {LOOKUP} if EXPLAINER in fresh else fresh - {LOOKUP}
            kept = [explanation for name, explanation in new.items() if name in fresh]
            ids = store.replace_explanations(
                [e._replace(explainer=e.explainer + NOW, notes={**(e.notes or {}), "now": made}) for e in kept]
            )
            if {EXPLAINER, LOOKUP} <= fresh & set(new):
                store.add_scores(work.score(*((ids[name + NOW], new[name]) for name in (EXPLAINER, LOOKUP))))
    except (SaeItalianError, sqlite3.Error, OSError) as error:
        return " ".join(str(error).split())
    return ""


def same(known: Explanation | None, other: Explanation) -> bool:
    """Return whether an explanation says what a known one does."""
    return known is not None and (known.status, known.text_it, known.text_en) == ("ok", other.text_it, other.text_en)


def with_now(found: dict[str, dict[int, Explanation]]) -> dict[str, dict[int, Explanation]]:
    """Return explanations by explainer and latent with those made on demand in the places that a run left empty.

    They are told by their `explainer`, which keeps its `@now`. One that says something else than the run's stays under
    its own name; one that says the same is left out.
    """
    merged = {name: dict(own) for name, own in found.items() if not name.endswith(NOW)}
    for name in (name for name in found if name.endswith(NOW)):
        of_run = merged.setdefault(name.removesuffix(NOW), {})
        for latent, explanation in found[name].items():
            known = of_run.get(latent)
            if known is None or known.status != "ok":
                of_run[latent] = explanation
            elif not same(known, explanation):
                merged.setdefault(name, {})[latent] = explanation
    return merged


def made_now(explanation: Explanation) -> str:
    """Return when an explanation was made on demand (ISO 8601), empty for a run's."""
    now: Any = (explanation.notes or {}).get("now")
    return now["when"] if explanation.explainer.endswith(NOW) and now else ""
