"""The words that people read, from one bilingual table (`labels.yaml`): labels, metric names, names of controls.

A key is `heading.name`, as in `card.l0`. To add words, write them into the YAML under your room's heading.

And the `key=value` words that people give: how commands take their rare settings, and what replaces a config's keys. Their
values are YAML.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from sae_italian.base.errors import UsageError, nearest
from sae_italian.base.storage import packaged_yaml, read_yaml

Language = Literal["it", "en"]


@cache
def _table() -> dict[str, dict[str, dict[Language, str]]]:
    return packaged_yaml(Path(__file__).with_name("labels.yaml").read_text("utf-8"))


@cache
def labels(heading: str, language: Language = "en") -> dict[str, str]:
    """Return all labels under a heading by name, in the order of the table. Raises: KeyError when there is no such heading."""
    return {str(name): words[language] for name, words in _table()[heading].items()}


def label(key: str, language: Language = "en") -> str:
    """Return the label of `heading.name`. Raises: KeyError for a key that is not in the table."""
    heading, _, name = key.partition(".")
    return _table()[heading][name][language]


class _Filler(Formatter):
    """Puts numbers into a text as its language writes them: 1.234,5 in Italian, 12,3 % with its space."""

    def __init__(self, language: Language):
        self.language = language

    def format_field(self, value: Any, format_spec: str) -> str:
        text = super().format_field(value, format_spec)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return text
        text = text.replace("%", " %")
        return text.translate(str.maketrans(".,", ",.")) if self.language == "it" else text


def filled(text: str, values: Mapping[str, Any], language: Language) -> str:
    """Return a text whose fields `{name:form}` are filled, its numbers as its language writes them."""
    return _Filler(language).vformat(text, (), values)


def page_labels() -> dict[str, list[str]]:
    """Return every label by its whole key as [Italian, English]: how the page of the browser keeps its words."""
    table = _table().items()
    return {f"{heading}.{name}": [both["it"], both["en"]] for heading, words in table for name, both in words.items()}


# --- key=value words --------------------------------------------------------------------------------------------------


def read_word(word: str) -> tuple[str, Any]:
    """Return key and value of one word. Raises: UsageError for another form, and for a value that JSON has not."""
    key, equals, text = word.partition("=")
    if not equals:
        raise UsageError(f"{word!r:.80} is not of the form key=value, e.g. sae.k=64.")
    value = read_yaml(text, f"{word:.80}")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:  # a date, a set; a list that holds itself
        raise UsageError(f"{word!r:.80}: a number, a text or a list was expected ({error}). Quote a text.") from error
    return key.strip(), value


def read_words(words: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that words give, each of the type that `kinds` has for it; text needs no quotes.

    Raises: UsageError for another form, an unknown key, and a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in kinds:
            raise UsageError(f"{word!r:.80} is no setting here; key=value was expected. {nearest(key, kinds, 20)}")
        kind = TypeAdapter(kinds[key])
        try:
            found[key] = kind.validate_python(text, strict=True)
        except ValidationError:
            try:
                found[key] = kind.validate_python(read_word(word)[1])
            except ValidationError as error:
                raise refusal(error, key) from error
    return found


def refusal(error: Any, name: str = "") -> UsageError:
    """Return pydantic's first complaint as one line: what was given, as `name` or as a config's key, and what was expected."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return UsageError(f"the config lacks the key {key!r}.")
    expected = first["msg"].removeprefix("Input should be ").partition(", unable")[0]
    return UsageError(f"{name or f'config key {key!r}'} is {first['input']!r:.80}; it should be {expected}.")


def kinds_of(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the types of settings by what their defaults are; a number that is 1 or more by default stays so."""
    from pydantic import Field

    def kind(default: Any) -> Any:
        if isinstance(default, list | tuple):
            return list[str] if isinstance(default[0], str) else list[int | float]
        if isinstance(default, int) and not isinstance(default, bool):
            return Annotated[int, Field(ge=min(default, 1), lt=2**53)]
        return type(default)

    return {name: kind(default) for name, default in defaults.items()}
