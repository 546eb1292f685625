"""Embedding, surprisal and intervention scores of explanations, for a draw of the latents that a store explains.

Each beside its controls, on the same examples: another latent's explanation (`shuffled`) and a sentence that explains
nothing (`empty`). Intervention is asked of the promoted tokens too, the latent's output as the logit lens gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_italian.autointerp.examples import ExampleSource
from sae_italian.autointerp.explainers.choose import EXPLAINER, rule_of
from sae_italian.autointerp.explainers.text import statement
from sae_italian.autointerp.judged import score_rows
from sae_italian.autointerp.negatives import NegativeSource
from sae_italian.autointerp.protocols import Example, Score
from sae_italian.autointerp.run import SHUFFLED, cache_identity, stored_config, strangers
from sae_italian.autointerp.scorers import embedding, intervention, surprisal
from sae_italian.autointerp.scorers.embedding import Encode
from sae_italian.autointerp.scorers.subject import N_PROMPTS, Forward, TooLong
from sae_italian.autointerp.shown import segments
from sae_italian.autointerp.store import Explanation, Store
from sae_italian.autointerp.tokens import token_strings
from sae_italian.base.errors import UsageError
from sae_italian.base.statistics import NOTHING, mean_interval
from sae_italian.cache import FeatureCache

ENCODER, SUBJECT = "encoder", "subject"
NOTHING_SAID, PROMOTED = "empty", "promoted"
SAYS_NOTHING = {"it": "Un testo qualsiasi.", "en": "Any text at all."}
N_SEGMENTS = 20  # positives of a latent, and as many negatives of each source: each costs forward passes
SHOWN: tuple[tuple[str, str, str, str], ...] = (
    *((ENCODER, "embedding", "auroc", source) for source in ("random", "same-token")),
    *((SUBJECT, "surprisal", "auroc", source) for source in ("random", "same-token")),
    (SUBJECT, "intervention", "log_probability_gain", "none"),
    (SUBJECT, "intervention", "log_probability_gain", PROMOTED),
)


def score_with_models(
    cache: FeatureCache,
    tokenizer: Any,
    store: Path,
    *,
    latents: int,
    encode: Encode | None = None,
    forward: Forward | None = None,
    sae: Any = None,
    explainer: str = EXPLAINER,
    language: str = "it",
    context: int = 1024,
) -> None:
    """Add to a store what an encoder and the subject model say of some of its explanations; goes on where it stopped.

    `encode` gives the embedding score (judge `encoder`); `forward` gives surprisal, and with `sae` intervention too (judge
    `subject`; `context` is the model's). `latents` explained latents are drawn at random with the run's seed.

    Raises: UsageError when the store belongs to another cache, the tokenizer is not the cache's, or the explainer
    explained nothing.
    """
    from sae_italian.cache.layout import tokenizer_hash

    if tokenizer_hash(tokenizer) != cache.manifest.tokenizer_hash:
        raise UsageError(f"{cache.folder} was built with another tokenizer than the one given.")
    with Store(store, cache_identity(cache)) as opened:
        config = stored_config(opened)
        explained = {row: e for row, e in opened.explanations(explainer).items() if e[1].status == "ok"}
        if not explained:
            known = ", ".join(opened.explainers()) or "none"
            raise UsageError(f"{store} has no explanations by {explainer!r}; there are those of: {known}.")
        source = ExampleSource(cache, width=config.width, seed=config.seed)
        negatives = NegativeSource(source)
        drawn = np.random.default_rng(config.seed).permutation(sorted(explained))[:latents].tolist()
        scorer = _Scorer(cache, tokenizer, encode, forward, sae, language, context)
        other = strangers(drawn, config.seed)
        for judge, wanted in ((ENCODER, encode), (SUBJECT, forward)):
            if wanted is None:
                continue
            done = opened.scored(explainer, judge)
            for latent in tqdm([n for n in drawn if n not in done], desc=judge, unit="latent", disable=None):
                activity = source.activity(latent)
                shown = segments(source, activity, negatives.draw(latent, activity, "test", N_SEGMENTS))
                stranger = other.get(latent)
                texts = {"": scorer.text(explained[latent][1])}
                if stranger is not None:
                    texts[SHUFFLED] = scorer.text(explained[stranger][1])
                texts[NOTHING_SAID] = SAYS_NOTHING[language]
                found = (
                    scorer.embedded(texts, shown) if judge == ENCODER else scorer.read(latent, stranger, texts, shown)
                )
                rows = []
                for control, scores in found.items():
                    row_id = explained[stranger if control == SHUFFLED and stranger is not None else latent][0]
                    rows += score_rows(row_id, latent, control, judge, scores)
                opened.add_scores(rows)


class _Scorer:
    """An encoder, a subject model and its SAE before the examples of one latent at a time."""

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Any,
        encode: Encode | None,
        forward: Forward | None,
        sae: Any,
        language: str,
        context: int,
    ):
        self.cache, self.tokenizer, self.encode, self.forward, self.sae = cache, tokenizer, encode, forward, sae
        self.language, self.context = language, context
        self.strings = token_strings(tokenizer, len(tokenizer))

    def text(self, explanation: Explanation) -> str:
        """Return an explanation as a model is given it: of a rule what it says, without its figures."""
        if explanation.rule is None:
            return explanation.text(self.language)
        return statement(rule_of(explanation.rule), self.language)  # pyright: ignore[reportArgumentType]

    def promoted(self, latent: int) -> str:
        ids = np.asarray(self.cache.statistics["promoted_ids"][latent]).tolist()
        return ", ".join(self.strings[i].strip() for i in ids if i < len(self.strings))

    def embedded(self, texts: dict[str, str], shown: list[Example]) -> dict[str, list[Score]]:
        assert self.encode is not None
        return {control: embedding(self.encode, text, shown, self.language) for control, text in texts.items()}

    def read(
        self, latent: int, stranger: int | None, texts: dict[str, str], shown: list[Example]
    ) -> dict[str, list[Score]]:
        """Return surprisal and intervention; what does not fit into the context is a score that failed."""
        assert self.forward is not None
        settings: dict[str, Any] = {"language": self.language, "context": self.context}
        try:
            found = surprisal(self.forward, self.tokenizer, texts, shown, **settings)
        except TooLong:
            sources = dict.fromkeys(example.negatives for example in shown if example.negatives)
            failed = [Score("surprisal", name, {"auroc": NOTHING}, 0, 0, len(shown)) for name in sources]
            found = {control: list(failed) for control in texts}
        if self.sae is None:
            return found
        silent = sorted((e.tokens for e in shown if not e.positive), key=len, reverse=True)[:N_PROMPTS]
        asked = dict(texts) | {f"{PROMOTED} ": self.promoted(latent)}
        if stranger is not None:
            asked[f"{PROMOTED} {SHUFFLED}"] = self.promoted(stranger)
        try:
            scores = intervention(
                self.forward, self.tokenizer, self.sae.W_dec[latent].detach(), asked, silent, **settings
            )
        except TooLong:
            lost = Score("intervention", "none", {"log_probability_gain": NOTHING}, 0, 0, len(silent))
            scores = dict.fromkeys(asked, lost)
        for name, score in scores.items():
            of_promoted, _, control = name.rpartition(" ")
            found[control].append(Score(*_named(score, of_promoted)))
        return found


def _named(score: Score, negatives: str) -> tuple[Any, ...]:
    """Return a score's fields with what was asked about in the place of its negatives."""
    return (score.scorer, negatives or "none", score.metrics, score.n_positive, score.n_negative, score.n_failed)


def means(store: Path, explainer: str) -> list[dict[str, Any]]:
    """Return the mean over latents of each score, its controls', and by how much it exceeds another's explanation."""
    rows = []
    with Store(store, {}) as opened:
        for judge, scorer, metric, negatives in SHOWN:
            where = {"judge": judge, "scorer": scorer, "metric": metric, "negatives": negatives}
            every = opened.all_values(explainer=explainer, control="", **where)
            if not every:
                continue
            own = {latent: value for latent, value in every.items() if value is not None}
            row: dict[str, Any] = {"scorer": scorer, "metric": metric, "negatives": negatives, "n": len(own)}
            row["n_failed"] = len(every) - len(own)  # texts longer than the context, divergences out of reach
            row |= mean_interval(np.array(list(own.values()))).as_dict()
            for control in (SHUFFLED, NOTHING_SAID):
                theirs = opened.values(explainer=explainer, control=control, **where)
                both = [latent for latent in own if latent in theirs]
                gain = np.array([own[latent] - theirs[latent] for latent in both])
                row[control] = mean_interval(np.array([theirs[latent] for latent in both])).as_dict()
                row[f"over_{control}"] = mean_interval(gain).as_dict()
            rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the means as a Markdown table."""
    lines = [
        "| score | negatives | explanation | another's | empty | over another's | latents |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        of_promoted = row["negatives"] == PROMOTED
        name = f"{row['scorer']}, {row['metric'].replace('_', ' ')}" + (", promoted tokens" if of_promoted else "")
        over = row[f"over_{SHUFFLED}"]
        interval = "" if over["lo"] is None else f" ({over['lo']:+.3f} to {over['hi']:+.3f})"
        cells = [row["value"], row[SHUFFLED]["value"], row[NOTHING_SAID]["value"]]
        shown = " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells)
        gain = "-" if over["value"] is None else f"{over['value']:+.3f}{interval}"
        source = "-" if of_promoted else row["negatives"]
        failed = f" ({row['n_failed']} could not be scored)" if row["n_failed"] else ""
        lines.append(f"| {name} | {source} | {shown} | {gain} | {row['n']}{failed} |")
    return "\n".join(lines)
