"""A corpus that tries everything a text may hold, and the cache of a small SAE over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_italian.cache import build_cache

SCRIPT = "<script>window.harm=1</script><img src=x onerror='window.harm=1'>"
RTL = "\u202eoiggassem\u202c \u2067\u05e9\u05dc\u05d5\u05dd\u2069"
CONTROL = "nul\x00 campana\x07 indietro\x08 fine\x1b[31m"
LONG_WORD = "precipitevolissimevolmente" * 385  # 10,010 letters
PLAIN = "La città è più bella perché c'è il sole 🙂 e l’aria è tiepida."


def nasty_corpus(folder: Path) -> Path:
    """Write 60 documents, each nasty in one way, and plain at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cattivo.jsonl"
    with file.open("w", encoding="utf-8") as handle:
        for number in range(60):
            text = (
                f"{number}. {(SCRIPT, RTL, CONTROL, LONG_WORD[:2000] if number > 3 else LONG_WORD)[number % 4]} {PLAIN}"
            )
            handle.write(json.dumps({"text": text, "source": SCRIPT}, ensure_ascii=False) + "\n")
    return file


def nasty_cache(folder: Path, sae: Any, model: Any) -> Path:
    corpus = nasty_corpus(folder)
    return build_cache(sae, model, str(corpus), folder / "cache", n_tokens=None, split="all", sae_name=SCRIPT)
