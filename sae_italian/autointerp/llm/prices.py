"""What calls cost: a dated price file, and a count of tokens that says how it counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_italian.base.errors import UsageError

PRICE_FILE = Path(__file__).parent / "data" / "prices.json"
CHARACTERS_PER_TOKEN = 3.0
MESSAGE_TOKENS = 8  # what a chat template adds around a message
APPROXIMATION = f"1 token per {CHARACTERS_PER_TOKEN:g} characters and {MESSAGE_TOKENS} per message"
MILLION = 1_000_000

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens; `date` and `source` say where from."""

    tokens_in: float
    tokens_out: float
    tokens_cached: float
    date: str = ""
    source: str = ""

    def usd(self, tokens_in: int, tokens_out: int, tokens_cached: int = 0) -> float:
        """Return the cost of a call; `tokens_cached` of its input tokens came from the server's prefix cache."""
        fresh = tokens_in - tokens_cached
        total = fresh * self.tokens_in + tokens_cached * self.tokens_cached + tokens_out * self.tokens_out
        return total / MILLION


def price_of(model: str, file: Path = PRICE_FILE) -> Price | None:
    """Return a model's price, None when the file does not know it. Raises: UsageError when the file is no price file."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if model in table.get("free", ()):
            return Price(0.0, 0.0, 0.0, str(table["version"]), f"free in {file.name}")
        entry = table["models"].get(model)
        if entry is None:
            return None
        price = Price(
            float(entry["in"]),
            float(entry["out"]),
            float(entry.get("cached", entry["in"])),
            str(entry.get("date", table["version"])),
            str(entry.get("source", file.name)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is no price file ({type(error).__name__}: {error}): expected "
            '{"version": ..., "models": {NAME: {"in": USD, "out": USD per million tokens}}}.'
        ) from error
    if min(price.tokens_in, price.tokens_out, price.tokens_cached) < 0:
        raise UsageError(f"{file} gives {model} a price below 0.")
    return price


@dataclass(frozen=True)
class TokenCounter:
    """Counts prompt tokens: exactly with a tokenizer of the model, else by the stated approximation."""

    count_text: Callable[[str], int] | None = None
    how: str = APPROXIMATION

    @classmethod
    def of(cls, tokenizer: Any, name: str) -> TokenCounter:
        return cls(lambda text: len(tokenizer(text)["input_ids"]), f"the tokenizer of {name}")

    def text(self, text: str) -> int:
        return self.count_text(text) if self.count_text else math.ceil(len(text) / CHARACTERS_PER_TOKEN)

    def messages(self, messages: Messages) -> int:
        return sum(self.text(message["content"]) + MESSAGE_TOKENS for message in messages)
