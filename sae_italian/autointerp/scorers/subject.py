"""Scores by a model itself. By the subject model: does the explanation make the latent's text, or the latent's effect, likelier?

Surprisal asks of the input side: is a segment on which the latent is active likelier after its explanation than after a
sentence that says nothing? Intervention asks of the output side: after the latent's direction has been added, is the
explanation likelier to follow what the model writes? Small base models read explanations badly, so both come beside the
behavioural scores (Paulo et al. 2024), and mean nothing without their controls: any text before a segment, or after what
was written, changes its likelihood. So all texts are asked about the same segments and the same continuations.

By vectors of texts. Embedding: are the latent's segments nearer to the explanation than silent ones? The explanation is
put as the query of a retrieval task, the segments are the documents, the score is AUROC of the cosines (Paulo et al. 2024).
The encoder must know Italian. Encoders agree only weakly with people on Italian explanations, so this too comes beside.

Two scores need no explanation, whose length and choice of examples they are free of (arXiv 2507.08473): do the segments on
which a latent fires belong together? Intruder: of five segments four are positives of neighbouring strength and one is
silent; that with the least mean cosine to the others is taken for the silent one; accuracy, chance is 1/5. Example
embedding: is a segment nearer to the mean of the positives than to that of the negatives, its own document and its pair left
out? AUROC. Where the silent segments hold the latent's own token, that token does not give the answer. Their control is
the same with the segments' roles shuffled.

Vectors of character n-grams stand beside an encoder's: what meaning adds to form is the difference.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_italian.autointerp.examples import LatentExamples, promoted_tokens
from sae_italian.autointerp.places import piece_texts
from sae_italian.autointerp.scorers import Asked, Score, scorer
from sae_italian.autointerp.scorers.binary import mean_and_falls, ranked, ranking
from sae_italian.base.errors import UsageError
from sae_italian.base.labels import Language
from sae_italian.base.statistics import NOTHING, Estimate, bootstrap, shares_by_document
from sae_italian.cache import FeatureCache
from sae_italian.models.activations import continuation_log_probs, logits_of, logits_with_replacement
from sae_italian.saes import hooks_of

EMPTY = {"it": "Varie frasi senza legame fra loro.", "en": "Various unrelated sentences."}
ASKS = {"it": "\nIn breve, si parla di:", "en": "\nIn short, this is about:"}
PROMOTED = "promoted"  # in the negatives' place: the latent's output by the logit lens
N_NEW, N_PROMPTS = 8, 30
CONTEXT = 1024  # tokens, of a model whose configuration names none
DIVERGENCE = 0.5  # nats: the strength of an intervention that all latents are compared at
TOLERANCE = 0.1  # of the divergence
_BATCH = 32

Replace = Callable[[Tensor], Tensor]
Forward = Callable[..., Tensor]
"""The subject model as logits [batch, pos, vocab] of tokens [batch, pos]; `replace`, where given, changes the activation
that the SAE reads."""


@dataclass(frozen=True)
class SubjectJudge:
    """The subject model as a judge of explanations. Without directions it judges the input side only."""

    forward: Forward
    tokenizer: Any
    directions: Float[Tensor, "d_sae d_in"] | None = None
    promoted: Callable[[int], Sequence[str]] = lambda latent: ()  # the tokens that a latent promotes
    language: Language = "it"
    context: int = CONTEXT
    name: str = "subject"

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Float[np.ndarray, " n"]:
        """Return the log-likelihood in nats of the second part of each pair after the first.

        NaN for all when one does not fit into the model's context: an explanation is scored on everything or not at all.
        """
        if max((len(prefix) + len(rest) for prefix, rest in pairs), default=0) > self.context:
            return np.full(len(pairs), np.nan)
        return continuation_log_probs(lambda rows, at: self.forward(rows)[at], pairs, batch_size=_BATCH)

    def after_text(self, text: str, segments: Sequence[np.ndarray]) -> Float[np.ndarray, " n"]:
        """Return the log-likelihood of each segment after a text."""
        prefix = list(self.tokenizer(text + "\n")["input_ids"])
        return self.log_likelihoods([(prefix, segment.tolist()) for segment in segments])

    def of_text(self, text: str, written: Int[Tensor, "batch new"]) -> Float[np.ndarray, " batch"]:
        """Return the log-likelihood of a text after what was written, a row each."""
        pairs = []
        for row in written:
            before = self.tokenizer.decode(row.tolist()) + ASKS[self.language]
            # tokenised in one go: a tokenizer that puts spaces before words does so here as it would in a text
            whole, start = (list(self.tokenizer(each)["input_ids"]) for each in (f"{before} {text}", before))
            shared = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
            pairs.append((whole[:shared], whole[shared:]))
        return self.log_likelihoods(pairs)


def subject_judge(cache: FeatureCache, model: Any) -> SubjectJudge:
    """Return the model that a cache was built with as a judge, the cache's SAE giving the directions."""
    tokenizer, sae = model.tokenizer, cache.load_sae()
    hook = hooks_of(sae)[1]  # where its latents write
    strings = piece_texts(tokenizer, len(tokenizer))

    def forward(tokens: Tensor, replace: Replace | None = None) -> Tensor:
        if replace is not None:
            return logits_with_replacement(model, tokens.to(model.device), hook, replace)
        with torch.no_grad():
            return logits_of(model, tokens.to(model.device))

    return SubjectJudge(
        forward,
        tokenizer,
        sae.W_dec,
        lambda latent: promoted_tokens(cache, strings, latent),
        context=getattr(model.config, "max_position_embeddings", None) or CONTEXT,
    )


@scorer(needs="forward", metric="auroc")
def surprisal(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score log p(segment | explanation) - log p(segment | nothing said); what does not fit the context fails."""
    judge: Any = asked[0].judge
    segments = [example.tokens for example in examples.test]
    untold = judge.after_text(EMPTY[judge.language], segments)
    texts = [one.explanation.text(judge.language) for one in asked]
    yield from ranking(asked, examples, [judge.after_text(text, segments) - untold for text in texts])


@scorer(needs="forward", metric="log_probability_gain")
def intervention(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score how many nats likelier adding the latent's direction makes an explanation, and its latent's promoted tokens."""
    judge: Any = asked[0].judge
    if judge.directions is None:
        return
    shown: Any = examples.test
    silent = sorted((i for i, e in enumerate(shown) if not e.positive), key=lambda i: -len(shown[i].tokens))[:N_PROMPTS]
    prompts, documents = [shown[i].tokens for i in silent], shown.document[silent]
    texts = {(one, "none"): one.explanation.text(judge.language) for one in asked}
    own = [one for one in asked if one.explanation.explainer]  # not what explains nothing
    texts |= {(one, PROMOTED): ", ".join(judge.promoted(one.explanation.latent)) for one in own}
    effect = effects(judge, judge.directions[examples.latent].detach(), texts, prompts, documents)
    for (one, about), (found, falls) in effect.items():
        n = (len(silent), 0) if "strength" in found else (0, len(silent))
        yield one, Score(about, found, n[0], 0, n[1], {"log_probability_gain": falls})


def effects(
    judge: SubjectJudge,
    direction: Float[Tensor, " d_in"],
    texts: Mapping[Any, str],
    prompts: Sequence[Int[np.ndarray, " tokens"]],
    documents: Int[np.ndarray, " prompts"],
    *,
    divergence: float = DIVERGENCE,
) -> dict[Any, tuple[dict[str, Estimate], list[float]]]:
    """Return for each text by how many nats adding the direction makes it likelier after what is written, and its falls.

    All latents are compared at the same mean divergence of the next token's distribution from the clean one, in nats; the
    strength that gives it is searched and reported. Both continuations are sampled with the same seed. A direction that
    cannot reach the divergence, and texts of which one does not fit into the context, have no score. Prompts are cut to
    the shortest one; the interval is over their documents, a fall is that without a group of these.
    """
    nothing: Any = {name: ({"log_probability_gain": NOTHING}, []) for name in texts}
    shortest = min((len(prompt) for prompt in prompts), default=0)
    if shortest == 0:
        return nothing
    bos = [] if judge.tokenizer.bos_token_id is None else [judge.tokenizer.bos_token_id]
    tokens = torch.stack([torch.tensor([*bos, *prompt[:shortest].tolist()]) for prompt in prompts])
    strength, reached = strength_of(judge.forward, tokens, direction, divergence)
    if strength is None:
        return nothing
    written = [written_after(judge.forward, tokens, replace) for replace in (adding(direction, strength), None)]
    gains = {name: np.subtract(*(judge.of_text(text, rows) for rows in written)) for name, text in texts.items()}
    if any(np.isnan(gain).any() for gain in gains.values()):
        return nothing
    at = {"strength": NOTHING._replace(value=strength), "divergence": NOTHING._replace(value=reached)}
    index, found = np.unique(documents, return_inverse=True)[1], {}
    for name, gain in gains.items():
        sums = np.stack([np.bincount(index, gain), np.bincount(index)], axis=1)
        mean = bootstrap(sums, lambda total: total[:, 0] / total[:, 1])
        found[name] = {"log_probability_gain": mean, **at}, mean_and_falls(gain, documents)[1]
    return found


def adding(direction: Float[Tensor, " d_in"], strength: float) -> Replace:
    """Return what adds a direction to an activation."""
    return lambda x: x + strength * direction.to(x)


@torch.no_grad()
def strength_of(
    forward: Forward, tokens: Int[Tensor, "batch pos"], direction: Float[Tensor, " d_in"], wanted: float
) -> tuple[float | None, float]:
    """Return the strength at which KL(intervened || clean) of the next token is as wanted to 10 %, and that divergence."""
    clean = forward(tokens)[:, -1].float().log_softmax(dim=-1)

    def at(strength: float) -> float:
        log_p = forward(tokens, adding(direction, strength))[:, -1].float().log_softmax(dim=-1)
        return float((log_p.exp() * (log_p - clean)).sum(dim=-1).mean())

    low, high = 0.0, 1.0
    while (reached := at(high)) < wanted:
        low, high = high, 2 * high
        if high > 2**20:
            return None, reached
    for _ in range(40):
        middle = (low + high) / 2
        reached = at(middle)
        if abs(reached - wanted) <= TOLERANCE * wanted:
            return middle, reached
        low, high = (middle, high) if reached < wanted else (low, middle)
    return None, reached


@torch.no_grad()
def written_after(
    forward: Forward, tokens: Int[Tensor, "batch pos"], replace: Replace | None
) -> Int[Tensor, "batch new"]:
    """Return what the model writes after the prompts, sampled."""
    generator = torch.Generator().manual_seed(0)  # the same draws after either
    written = tokens
    for _ in range(N_NEW):
        p = forward(written, replace)[:, -1].float().softmax(dim=-1).cpu()
        written = torch.cat([written, torch.multinomial(p, 1, generator=generator)], dim=1)
    return written[:, tokens.shape[1] :]


# --- vectors of texts -------------------------------------------------------------------------------------------------


N_GRAMS = "n-grams"  # an encoder that needs no model
ALIKE = 4  # positives that an intruder stands among
QUERIES = {
    "it": "Instruct: Trova le frasi che potrebbero avere a che fare con la spiegazione.\nQuery:",
    "en": "Instruct: Retrieve sentences that could be related to the explanation.\nQuery:",
}


@dataclass(frozen=True)
class EncoderJudge:
    """A judge that puts texts as vectors: `encode` turns n texts into an array [n, d]."""

    encode: Callable[[Sequence[str]], Float[np.ndarray, "texts d"]]
    language: Language = "it"
    name: str = "encoder"


@scorer(needs="encode", metric="auroc")
def embedding(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score the cosine between the explanation and each test segment."""
    strengths = []
    for one in asked:
        judge: Any = one.judge
        query = QUERIES[judge.language] + one.explanation.text(judge.language)
        unit = _unit(judge.encode([query, *(example.text for example in examples.test)]))
        strengths.append(unit[1:] @ unit[0])
    yield from ranking(asked, examples, strengths)


@lru_cache(maxsize=8)
def unit_vectors(judge: EncoderJudge, examples: LatentExamples) -> Float[np.ndarray, "examples d"]:
    """Return the vectors of a latent's test segments at length 1; those without any are zero."""
    return _unit(judge.encode([example.text for example in examples.test]))


def _unit(vectors: Float[np.ndarray, "texts d"]) -> Float[np.ndarray, "texts d"]:
    found = np.asarray(vectors, dtype=np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)


def roles(
    asked: Sequence[Asked], examples: LatentExamples
) -> Iterator[tuple[Asked, str, Int[np.ndarray, " n"], Int[np.ndarray, " n"]]]:
    """Yield by source the positives, the strongest first, and a negative for each.

    As control the roles are shuffled. What explains nothing is not asked: it would see the same.
    """
    shown: Any = examples.test
    strongest = np.array([own.max(initial=0.0) for own in shown.activations])
    for one in (one for one in asked if one.explanation.explainer):
        for source, (positive, negative) in shown.questions.items():
            order = np.argsort(-strongest[positive], kind="stable")
            both = np.concatenate([positive[order], negative[order]])
            if one.control:  # not sorted then: the strongest would be the true positives
                both = np.random.default_rng(examples.latent).permutation(both)
            yield one, source, both[: len(positive)], both[len(positive) :]


@scorer(needs="encode", metric="accuracy")
def intruder(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score how often the silent one of five segments is the odd one out; equals share the answer."""
    shown: Any = examples.test
    for one, source, positive, negative in roles(asked, examples):
        unit, n = unit_vectors(one.judge, examples), len(positive)
        first = np.minimum(np.arange(n) // ALIKE * ALIKE, n - ALIKE)
        others = np.roll(negative, ALIKE)  # not the four's own, which may share their token
        five = np.concatenate([positive[first[:, None] + np.arange(ALIKE)], others[:, None]], axis=1)
        near = (unit[five] * (unit[five].sum(axis=1, keepdims=True) - unit[five])).sum(axis=2)
        odd = near <= near.min(axis=1, keepdims=True) + 1e-9
        right = odd[:, -1] / odd.sum(axis=1)
        groups = np.unique(first, return_inverse=True)[1]  # trials on the same positives are one document
        found = shares_by_document(np.bincount(groups, right)[None], np.bincount(groups)[None])[:, 0]
        # a trial goes with its silent segment's document: such intervals of a mean cover 97 to 99 % of simulated ones
        falls = mean_and_falls(right, shown.document[others])[1]
        yield one, Score(source, {"accuracy": Estimate(*found.tolist())}, n, n, falls={"accuracy": falls})


@scorer(needs="encode", metric="auroc")
def example_embedding(asked: Sequence[Asked], examples: LatentExamples) -> Iterator[tuple[Asked, Score]]:
    """Score the mean cosine to positives less that to negatives, all of other documents."""
    shown: Any = examples.test
    for one, source, positive, negative in roles(asked, examples):
        rows, n = np.concatenate([positive, negative]), len(positive)
        unit, document = unit_vectors(one.judge, examples)[rows], shown.document[rows]
        cosine, truth, pair = unit @ unit.T, np.arange(len(rows)) < n, np.arange(len(rows)) % n
        apart = (document[:, None] != document) & (pair[:, None] != pair)  # a pair may share its token
        sides = apart & truth, apart & ~truth
        with np.errstate(invalid="ignore"):  # where all positives, or all negatives, are of one document
            near, far = ((cosine * side).sum(axis=1) / side.sum(axis=1) for side in sides)
        yield one, ranked(source, near - far, truth, document)


def n_grams(texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
    """Return the texts' character n-grams, weighted by how rare they are in these texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    found = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True).fit_transform(texts)
    return found.toarray()


class Encoder:
    """A local sentence encoder: any Hugging Face encoder's folder, mean of the last hidden states over the tokens."""

    def __init__(self, folder: str | Path):
        """Raises: UsageError when the folder holds no model."""
        from transformers import pipeline

        if not (Path(folder) / "config.json").is_file():
            raise UsageError(
                f"{folder} holds no sentence encoder (no config.json). Give the folder of a multilingual "
                "one, such as a downloaded paraphrase-multilingual-mpnet-base-v2."
            )
        self.read: Any = pipeline("feature-extraction", model=str(folder), return_tensors=True)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Return one vector per text; texts longer than the encoder's context are cut."""
        limit = min(getattr(self.read.model.config, "max_position_embeddings", 512), 512)
        form = {"truncation": True, "max_length": limit, "return_token_type_ids": False}
        states = self.read(list(texts), tokenize_kwargs=form)
        return np.stack([hidden[0].mean(dim=0).float().numpy() for hidden in states])
