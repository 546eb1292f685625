"""Explanations and judgements by a language model behind any OpenAI-compatible endpoint, and what can be set of it.

Each setting is defined once, for every command that asks a model: the frequent ones are options (`LLMOptions`), the rare ones
`key=value` words (`with_words`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AnyHttpUrl, Field, PositiveInt, TypeAdapter, ValidationError

from sae_italian.base.errors import UsageError
from sae_italian.base.labels import read_words, refusal

KEY_VARIABLE = "LLM_API_KEY"
AboveZero = Annotated[float, Field(gt=0, le=1e9)]  # no thread can wait for longer seconds


@dataclass(frozen=True, kw_only=True)
class LLMOptions:
    """The settings that people change often: options of a command."""

    explainer: Literal["rule", "llm"] = "rule"
    """Who explains: rules, which need no model, or a language model as well."""
    judge: Literal["rule", "llm"] | None = None
    """Who judges the explanations; default: as --explainer."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server, such as http://localhost:8000/v1; default: none."""
    llm_model: str | None = None
    """Name of the language model on that server; default: none."""
    language: Literal["it", "en"] = "it"
    """Language of the prompts and the explanations."""
    n_shown: int = 20
    """Examples of a latent that the explaining model is shown, drawn from twice as many of the training documents."""
    estimate: bool = False
    """Print how many calls, tokens and dollars a run would take; nothing is sent."""
    max_usd: float | None = None
    """Stop before this run's calls can cost more US dollars; default: no limit."""

    def with_words(self, words: Sequence[str] = ()) -> LLMSettings:
        """Return the whole settings, the rare ones from `key=value` words.

        Raises: UsageError for an unknown key, a value of the wrong kind, or settings that cannot go together.
        """
        given: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(LLMOptions)}
        options = {name: f"--{name.replace('_', '-')}" for name in given}
        hints = get_type_hints(LLMSettings, include_extras=True)
        given |= read_words(words, {name: hint for name, hint in hints.items() if name not in given})
        try:
            settings = TypeAdapter(LLMSettings).validate_python(given)
        except ValidationError as error:
            raise refusal(error, options[str(error.errors()[0]["loc"][0])]) from error
        settings.check()
        return settings


@dataclass(frozen=True, kw_only=True)
class LLMSettings(LLMOptions):
    """All settings of a language model. What decides an answer is part of the key it is kept under."""

    n_shown: PositiveInt = LLMOptions.n_shown
    max_usd: AboveZero | None = None
    concurrency: Annotated[int, Field(ge=1, le=100)] = 8
    """Calls in flight at once, 1 to 100."""
    key_env: str | None = None
    """Environment variable that holds the server's key; default: LLM_API_KEY, if it is set."""
    prices: Path | None = None
    """Price file (US dollars per million tokens); default: the one that comes with the package."""
    scores: tuple[Literal["detection", "fuzzing", "simulation"], ...] = ("detection", "fuzzing", "simulation")
    """What the judge is asked for; fewer scores are fewer calls: scores=[detection] a third of them."""
    context_tokens: PositiveInt | None = None
    """Tokens that prompt and answer may take together: examples are left out until they fit; default: no bound."""
    shown: Literal["deciles", "top"] = "deciles"
    """Which examples are shown: equally many of each tenth of the activations, or the strongest."""
    promoted: bool = False
    """Show the tokens that the latent promotes as well: its output, not when it is active."""
    llm_tokenizer: str | None = None
    """Folder or name of a model whose tokenizer counts the prompts' tokens; default: 3 characters a token."""
    timeout: AboveZero = 120.0
    """Seconds to wait for one answer."""
    attempts: PositiveInt = 6
    """Times that a call is tried when the server is busy or does not answer."""
    max_output_tokens: PositiveInt | None = None
    """Tokens an answer may have, thinking included; default: what the answer alone needs (160 to explain)."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Sampling temperature; 0: always the likeliest token."""
    seed: int | None = 0
    """Seed that is sent to the server; null: none."""
    reasoning_effort: str | None = None
    """How long a thinking model thinks (low, medium, high, ...); default: not sent."""
    extra_body: dict[str, Any] | None = None
    """More fields of the request, for servers with settings of their own; default: none."""

    @property
    def wants_llm(self) -> bool:
        """Return whether a language model explains or judges."""
        return "llm" in (self.explainer, self.judge)

    @property
    def sampling(self) -> dict[str, Any]:
        """Return what decides an answer besides its prompt, by the names of the OpenAI API."""
        given = {"temperature": self.temperature, "seed": self.seed, "reasoning_effort": self.reasoning_effort}
        return {name: value for name, value in given.items() if value is not None} | (self.extra_body or {})

    def key(self) -> str | None:
        """Return the server's key, of the environment alone. Raises: UsageError when the variable named is not set, or no key."""
        name = self.key_env or KEY_VARIABLE
        key = os.environ.get(name, "").strip()  # of a file's line only the line's end went with it
        if self.key_env and not key:
            raise UsageError(f"the environment has no {self.key_env}; keys are read from there alone.")
        if not (key.isascii() and key.isprintable()):
            raise UsageError(f"what {name} holds is no key: signs of ASCII were expected. Set it again.")
        return key or None

    def check(self) -> None:
        """Raise UsageError, naming the option, for settings that cannot go together."""
        if not self.wants_llm:
            if self.endpoint or self.llm_model or self.estimate:
                raise UsageError(
                    "--endpoint, --llm-model and --estimate are for --explainer llm or --judge llm; add one."
                )
            return
        if self.judge == "rule":
            raise UsageError("the rule judge cannot read a text: --explainer llm needs --judge llm.")
        if not self.llm_model or not (self.endpoint or self.estimate):
            raise UsageError("an LLM needs --endpoint URL and --llm-model NAME.")
        url = self.endpoint or "http://localhost"
        try:
            str(AnyHttpUrl(url).host).encode("idna")  # as Python will, to look it up
            good = url.isprintable()
        except ValueError:
            good = False
        if not good:
            raise UsageError(f"--endpoint is {url!r}; expected a URL such as http://localhost:8000/v1.")
