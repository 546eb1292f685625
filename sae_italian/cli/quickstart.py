"""The command `quickstart`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sae_italian.base.errors import UsageError
from sae_italian.cli.options import Folder, Result, positive

CARD_TOKENS = "card_tokens"


def quickstart(
    config: str = "mini/topk",
    /,
    *words: str,
    out: Path = Path("quickstart"),
    tokens: int = 300_000,
    n_latents: int | None = None,
    folder: Annotated[Folder, Parameter(name="*")] = Folder(),  # noqa: B008
) -> Result:
    """Go the whole way on the embedded model: train, cache, explain, score, report.

    Args:
        config: A training config, of one SAE.
        words: Settings that replace the config's, as key=value; card_tokens=N: held-out tokens of the evaluation card,
            default 50,000.
        out: Output folder.
        tokens: Held-out tokens to cache.
        n_latents: Explain this many live latents, drawn at random; default: all.
    """
    from sae_italian.quickstart import quickstart as run
    from sae_italian.quickstart import table_of

    sizes = [word.partition("=")[2] for word in words if word.startswith(f"{CARD_TOKENS}=")]
    if not all(size.replace("_", "").isdigit() for size in sizes):
        raise UsageError(f"{CARD_TOKENS} is {sizes[-1]!r}; a number of tokens was expected.")
    card = {CARD_TOKENS: int(sizes[-1])} if sizes else {}
    positive(tokens=tokens, n_latents=n_latents)
    overrides = [word for word in words if not word.startswith(f"{CARD_TOKENS}=")]
    results = run(out, config, *overrides, cache_tokens=tokens, latents=n_latents, **card, **asdict(folder))
    return Result(results, f"\n{table_of(results)}\n\nReport: {results['report']}")
