"""Live work on one cache's SAE and model: a sentence's latents, steering, ablation, explanations made now.

The same object serves the server and the notebook. One call at a time: whoever shares it queues in front of it.
"""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from sae_italian.analysis.latent import ablate, steer
from sae_italian.autointerp.choose import EXPLAINER, LOOKUP
from sae_italian.autointerp.examples import LatentExamples
from sae_italian.autointerp.llm import LLMSettings
from sae_italian.autointerp.run import STORE_FILE
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.work import Work, config_of, keep
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.report import plain
from sae_italian.browser.contexts import pieces, storable
from sae_italian.browser.directions import rounded
from sae_italian.browser.source import told
from sae_italian.cache import FeatureCache
from sae_italian.cache.shards import encode_sparse
from sae_italian.corpora.packing import special_mask
from sae_italian.models.activations import read_activations

MAX_LETTERS, MAX_TOKENS = 10_000, 512  # of a sentence
PER_TOKEN, N_STRONGEST = 10, 20
MAX_STRENGTHS, LARGEST_STRENGTH = 6, 100.0
NEW_TOKENS = 24
ABLATED_SHOWN = 24  # positions of a prompt


class Refused(UsageError):
    """What is not answered: why, in English and Italian, and the HTTP status."""

    def __init__(self, english: str, italian: str, status: int = 422):
        super().__init__(english)
        self.italian, self.status = italian, status


def in_both(error: Exception | str) -> dict[str, str]:
    """Return what to say of an error on the page, a line in each language; what has no Italian is said in English."""
    italian = getattr(error, "italian", str(error))
    return {"error_it": " ".join(italian.split())[:1000], "error_en": " ".join(str(error).split())[:1000]}


EMPTY = "the text is empty. Type some.", "Scrivi un testo."


class Live:
    """`model` comes with its tokenizer; `llm` are the settings of a language model to explain with, where there is one."""

    def __init__(self, cache: FeatureCache, sae: Any, model: Any, llm: LLMSettings | None = None):
        self.cache, self.sae, self.model, self.llm = cache, sae, model, llm
        self.tokenizer = model.tokenizer
        self.maximum = cache.statistics["max"]
        self.positions = getattr(model.config, "max_position_embeddings", MAX_TOKENS)

    def call(self, name: str, arguments: Any) -> dict[str, Any]:
        """Do one piece of work by name with plain JSON arguments, from whoever asks.

        Raises: UsageError for arguments of the wrong kind, and as the work itself.
        """
        if not isinstance(arguments, dict) or set(arguments) != set(CALLS[name]):
            raise UsageError(f"{name} takes {', '.join(CALLS[name])}, all of them and nothing else.")
        checked = {key: CALLS[name][key](key, value) for key, value in arguments.items()}
        if "latent" in checked:
            self.cache.range_of(checked["latent"])
        return getattr(self, name)(**checked)

    @torch.no_grad()
    def tokens(self, sentence: str) -> dict[str, Any]:
        """Return a sentence in pieces with the strongest latents of each, and the strongest latents of all.

        A piece is a token, or the tokens that share a letter; the pieces joined are the sentence. `share` is the
        activation over the latent's largest one in the cache, `token` the piece where it is largest, `count` the number
        of pieces on which it is active. Special tokens are read past, as in the cache.
        """
        limit = min(MAX_TOKENS, self.positions)
        encoded = self.tokenizer(sentence := storable(sentence), return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"][:limit], dtype=np.int64)
        silent = special_mask(ids[None], self.tokenizer)[0]
        if silent.all():
            raise Refused(*EMPTY)
        batch = torch.from_numpy(ids)[None].to(self.model.device)
        x = read_activations(self.model, batch, self.sae.cfg.metadata.hook_name)
        found = encode_sparse(self.sae, x[0], silent).tocoo()
        spans = np.array(encoded["offset_mapping"][:limit])[~silent]
        cut, _, owner = pieces(sentence[: int(spans[:, 1].max())], spans, np.zeros(len(spans)))
        piece = np.array(owner)[(np.cumsum(~silent) - 1)[found.row]]
        order = np.lexsort((piece, found.col, -found.data))
        # of the tokens of one piece, the strongest counts
        _, first = np.unique(found.col[order].astype(np.int64) * len(cut) + piece[order], return_index=True)
        order = order[np.sort(first)]
        ranked = list(zip(*(a[order].tolist() for a in (piece, found.col, found.data)), strict=True))
        n_pieces, shown, strongest = Counter(latent for _, latent, _ in ranked), [[] for _ in cut], {}
        for place, latent, value in ranked:
            shown[place].append((latent, rounded(value)))
            most = float(self.maximum[latent])
            facts = {"latent": latent, "value": rounded(value), "share": rounded(value / most) if most > 0 else None}
            strongest.setdefault(latent, {**facts, "token": place, "count": n_pieces[latent]})
        return {
            "tokens": [{"text": text, "latents": own[:PER_TOKEN]} for text, own in zip(cut, shown, strict=True)],
            "strongest": list(strongest.values())[:N_STRONGEST],
            "n_tokens": int((~silent).sum()),
            "truncated": len(encoded["input_ids"]) > limit,
        }

    def steer(self, latent: int, prompt: str, strengths: list[float]) -> dict[str, Any]:
        """Return continuations with and without the latent; a strength of 1 is its largest activation in the cache."""
        self._fits(prompt, NEW_TOKENS)
        unit = float(self.maximum[latent]) or 1.0
        how: Any = prompt, latent, strengths, NEW_TOKENS
        return plain(steer(self.model, self.tokenizer, self.sae, *how, unit=unit))

    def ablate(self, latent: int, prompt: str) -> dict[str, Any]:
        """Return where the latent is active in the prompt, and the next tokens that change when it is taken away."""
        self._fits(prompt)
        found = plain(ablate(self.model, self.tokenizer, self.sae, prompt, latent))
        positions = sorted(found["positions"], key=lambda position: -position["activation"])
        return {**found, "positions": positions[:ABLATED_SHOWN], "n_active": len(positions)}

    def _fits(self, prompt: str, more: int = 0) -> None:
        """Raises: Refused for a text that does not fit into the model together with so many tokens more."""
        n, most = len(self.tokenizer(prompt)["input_ids"]), min(MAX_TOKENS, self.positions - more)
        if n > most:
            raise Refused(
                f"the text has {n:,} tokens; at most {most:,} are taken. Shorten it.",
                f"Il testo ha {n} token; se ne prendono al più {most}. Accorcialo.",
            )

    # --- explanations ------------------------------------------------------------------------------------------------

    @cached_property
    def _work(self) -> Work:
        return Work(self.cache, self.tokenizer, config_of(self.cache.folder / STORE_FILE), self.sae)

    def explain(self, latent: int) -> dict[str, Any]:
        """Return the latent's rule, made now from the cache, and an LLM's explanation where an endpoint is given.

        They are kept beside the cache, the rule with its scores; `not_kept` says why where that was not possible.
        """
        _, found = self._work.explain(latent)
        rule = next(e for e in found if e.explainer == EXPLAINER)
        if self.llm is not None and rule.status == "ok":
            examples = self._work.examples(latent, n_test=0, promoted=self._work.promoted(latent))
            found.append(ask_llm(self.llm, examples, self._ledger))
        shown = [_shown(explanation) for explanation in found if explanation.explainer != LOOKUP]
        not_kept = keep(self.cache.folder / STORE_FILE, self._work, found)
        return {"latent": latent, "explanations": shown, "not_kept": not_kept}

    @cached_property
    def _ledger(self) -> Path:
        """Where calls to an LLM are kept: with the cache, or in a file of this session where that cannot be written."""
        path = self.cache.folder / STORE_FILE
        try:
            Store(path, {}).connection.close()
        except SaeItalianError:
            self._folder = TemporaryDirectory(prefix="sae-italian-")  # goes with this object
            return Path(self._folder.name) / STORE_FILE
        return path


def ask_llm(settings: LLMSettings, examples: LatentExamples, ledger: Path) -> Explanation:
    """Return one explanation; the call is kept in the ledger, which answers when it is asked again."""
    from sae_italian.autointerp.llm.askers import LLMExplainer
    from sae_italian.autointerp.llm.client import Client

    with Client(settings, ledger) as client:
        explainer = LLMExplainer(client)
        try:
            return explainer.explain(examples)[0]
        except UsageError as error:  # the server is down: the rule beside it is shown all the same
            notes = {"problem": str(error)}
            return Explanation(examples.latent, explainer.name, "no answer", "", "", None, "llm", "", notes)


def _shown(explanation: Explanation) -> dict[str, Any]:
    numbers = {name: rounded((explanation.rule or {}).get(name)) for name in ("precision", "recall")}
    return {**told(explanation), **numbers, "problem": (explanation.notes or {}).get("problem")}


# --- arguments that come from outside ------------------------------------------------------------------------------------


def checked_text(name: str, value: Any) -> str:
    """Return a text from outside. Raises: UsageError for what is none, an empty and a too long one."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is not a text.")
    if len(value) > MAX_LETTERS:
        raise Refused(
            f"{name} has {len(value):,} characters; at most {MAX_LETTERS:,} are taken.",
            f"Il testo ha {len(value)} caratteri; se ne prendono al più {MAX_LETTERS}.",
        )
    text = storable(value)
    if not text.strip():
        raise Refused(*EMPTY)
    return text


def _latent(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"{name} is {str(value)[:40]!r}; the number of a latent was expected.")
    return value


def _strengths(name: str, value: Any) -> list[float]:
    some = isinstance(value, list) and 1 <= len(value) <= MAX_STRENGTHS
    if not some or not all(type(s) in (int, float) and abs(s) <= LARGEST_STRENGTH for s in value):
        raise Refused(
            f"{name}: 1 to {MAX_STRENGTHS} numbers between -{LARGEST_STRENGTH:g} and {LARGEST_STRENGTH:g}.",
            f"Intensità: da 1 a {MAX_STRENGTHS} numeri tra -{LARGEST_STRENGTH:g} e {LARGEST_STRENGTH:g}.",
        )
    return [float(s) for s in value]


CALLS: dict[str, dict[str, Callable[[str, Any], Any]]] = {
    "tokens": {"sentence": checked_text},
    "steer": {"latent": _latent, "prompt": checked_text, "strengths": _strengths},
    "ablate": {"latent": _latent, "prompt": checked_text},
    "explain": {"latent": _latent},
}
