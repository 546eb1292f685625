"""Answers to ExplainITA's tasks, explaining latents (1) and scoring explanations (2), and how good they are.

An LLM answers where one is given, else what the file alone shows does. Then task 1 gets a rule on the tokens, words, endings,
shapes or preceding words that the marked tokens share, and task 2 a lexical baseline: a sequence is explained when it holds
a word that the explanation quotes, or a word with an ending it names (-mente), or, where it does neither, a word of the same
stem as one in it. Neither needs the model or the SAE.

Submissions are scored by BERTScore (explanations) and detection metrics (sequences), with intervals over latents.

The data holds windows cut from longer contexts, and not the beginning of these, so a token's activation can differ from
the one stored where it depended on what was cut away; nor is it said whether a BOS came first. So both readings, with and
without BOS, are played, and agreement is reported rather than equality: on a window that began its context it is exact.
"""

import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from sae_italian.autointerp.examples import Example, Explainer
from sae_italian.autointerp.explainita import Excerpt, Latent, Task, as_example, as_examples, by_id
from sae_italian.autointerp.places import PREFIXES, SUFFIXES, Family, shape_of
from sae_italian.autointerp.rules import KeyRule, Tally
from sae_italian.autointerp.store import Explanation
from sae_italian.autointerp.wording import Language, statement
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import progress
from sae_italian.base.report import plain
from sae_italian.base.statistics import bootstrap, mean_interval
from sae_italian.base.units import in_threads
from sae_italian.models.activations import read_activations

MOST_KEYS = 12  # of a rule: a longer list is no explanation
WORTH = 0.02  # F1 that each doubling of a rule's keys must bring
NO_PATTERN = {"it": "nessuno schema evidente", "en": "no evident pattern"}
STEM = 5  # letters that words of one stem share
_FEW_LETTERS = 4  # words shorter than this are mostly articles and prepositions
_QUOTED = re.compile(r"«([^»]+)»|\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']{2,})'(?!\w)")
_ENDING = re.compile(r"(?<!\w)-(\w{2,})")


def predict(
    latents: Sequence[Latent],
    task: Task,
    *,
    explainer: Explainer | None = None,
    judge: Any | None = None,
    language: Language = "it",
) -> tuple[dict[str, Any], int]:
    """Return by latent id a text (task 1) or a yes or no per sequence (task 2), and how many the LLM left open.

    What an explainer or a judge gives no usable answer to is answered as without one, and counted. Raises: UsageError
    without any latent, DataError for one that is there twice.
    """
    if not by_id(latents):
        raise UsageError("the file holds no rows: there is nothing to predict.")

    def answer(latent: Latent) -> tuple[str, tuple[Any, int]]:
        return latent.id, _explained(latent, explainer, language) if task == 1 else _judged(latent, judge)

    under_way = in_threads(answer, latents, getattr(explainer if task == 1 else judge, "concurrency", 1))
    done = list(progress("predict", under_way, total=len(latents), unit="latent"))
    return {name: given for name, (given, _) in done}, sum(failed for _, (_, failed) in done)


def _explained(latent: Latent, explainer: Explainer | None, language: Language) -> tuple[str, int]:
    if explainer is not None:
        found = explainer.explain(as_examples(latent))[0]
        if found.status == "ok":
            return found.text(language), 0
    rule = rule_of_passages(latent.sequences)
    return NO_PATTERN[language] if rule is None else statement(rule, language), int(explainer is not None)


def rule_of_passages(passages: Sequence[Excerpt]) -> KeyRule | None:
    """Return the keys of one family that tell active tokens from the others best (F1 per token); None without any.

    The others are the silent tokens of the same passages: the file holds no passage on which the latent is silent.
    """
    examples = [as_example(passage) for passage in passages if passage.strengths is not None]
    if not any(example.activations.any() for example in examples):
        return None
    value = np.concatenate([example.activations for example in examples])
    keys = [keys_at(example, i) for example in examples for i in range(len(example.tokens))]
    families: list[Family] = list(dict.fromkeys(family for here in keys for family in here))
    fitted = [_fit(family, [here.get(family) for here in keys], value) for family in families]
    return max(fitted, key=lambda scored: scored[0])[1]


def keys_at(example: Example, i: int) -> dict[Family, str]:
    """Return what a rule can look at in token i: itself, the word it ends, the word's shape, and the word before."""
    start, end = (int(x) for x in example.spans[i])
    token = example.text[start:end].strip()
    # a file does not say where a token stands in its word: all are told as words are
    found: dict[Family, str] = {"token": f" {token}" if token[:1].isalnum() else token}
    words = [match.span() for match in re.finditer(r"\w+['’]?|[^\w\s]+", example.text)]
    here = next((n for n, (first, last) in enumerate(words) if first < end <= last), None)
    if here is None or not token:
        return found if token else {}
    first, last = words[here]
    word = example.text[first:last] if end == last else ""  # "": it goes on
    found["shape"] = shape_of(word)
    if word:
        letters = found["word"] = word.lower()
        found |= {f: letters[-n:] for f, n in SUFFIXES.items() if len(letters) > n and letters[-n:].isalpha()}
    if here > 0:
        found["previous-word"] = example.text[slice(*words[here - 1])].lower()
    begun = example.text[first:end].lower()
    found |= {f: begun[:n] for f, n in PREFIXES.items() if len(begun) > n and begun[:n].isalpha()}
    return found


def _fit(family: Family, keys: list[str | None], value: np.ndarray) -> tuple[float, KeyRule]:
    """Return the worth of a family's best rule, and the rule: keys in order of their rate as long as F1 grows."""
    base, n_active = float((value > 0).mean()), int((value > 0).sum())
    value = value[[key is not None for key in keys]]
    names, at = np.unique([key for key in keys if key is not None], return_inverse=True)
    total, active, mass = (np.bincount(at, weights) for weights in (np.ones(len(at)), value > 0, value))
    tally = Tally(np.arange(len(names)), active, mass, total)
    order = np.flatnonzero(active > 0)
    order = order[np.lexsort((-active[order], -tally.rates(base)[order]))][:MOST_KEYS]
    f1 = 2 * np.cumsum(active[order]) / (np.cumsum(total[order]) + n_active)
    worth = f1 - WORTH * np.log2(np.arange(1, len(order) + 1))
    best = int(np.argmax(worth)) if len(order) else -1
    chosen = np.sort(order[: best + 1])
    rule = tally.take(chosen).rule(family, names[chosen].tolist(), n_active, base, float(mass.sum()) or 1.0)
    return (float(worth[best]) if len(order) else -1.0), rule


def _judged(latent: Latent, judge: Any | None) -> tuple[list[bool], int]:
    examples, text = [as_example(passage) for passage in latent.sequences], latent.explanation or ""
    plain = np.array([mentions(text, example.text) for example in examples], dtype=bool)
    if judge is None:
        return plain.tolist(), 0
    said = judge.detect(Explanation(latent.index, "", "ok", text, "", None), examples).said
    return np.where(said < 0, plain, said > 0).tolist(), int((said < 0).sum())


def mentions(explanation: str, text: str) -> bool:
    """Return whether a text holds what an explanation quotes or ends with, or else a word of a stem in it."""
    text = text.lower().replace("’", "'")
    words = re.findall(r"\w+", text)
    quoted = [next(filter(None, groups)).lower().replace("’", "'").strip() for groups in _QUOTED.findall(explanation)]
    endings = tuple(ending.lower() for ending in _ENDING.findall(explanation))
    if any(quoted) or endings:  # a space alone says nothing
        # no part of a word, but a comma after one and the article of «l'acqua»
        named = any(re.search(rf"(?!\B\w){re.escape(one)}(?<!\w\B)", text) for one in quoted if one)
        return named or any(word.endswith(endings) for word in words)
    stems = {word[:STEM] for word in re.findall(r"\w+", explanation.lower()) if len(word) >= _FEW_LETTERS}
    return any(word[:STEM] in stems for word in words if len(word) >= _FEW_LETTERS)


# --- scores of submissions -------------------------------------------------------------------------------------------

DEFAULT_MODEL, DEFAULT_LAYER = "bert-base-multilingual-cased", 9  # bert-score's own choice of the layer
_MEASURES = ("correlation", "on_and_off_agree", "relative_error")
AGREES = 0.9  # correlation from which a latent counts as replayed


def evaluate_explanations(
    predicted: Sequence[Latent], gold: Sequence[Latent], *, model: str = DEFAULT_MODEL, layer: int | None = None
) -> dict[str, Any]:
    """Return BERTScore precision, recall and F1 of explanations against the human ones (mean over latents).

    `model` is a name or a local folder, `layer` the layer that is compared (default: bert-score's choice). Not rescaled
    with a baseline: figures are comparable only within one model and layer, which the result names.

    Raises: UsageError without the extra `bertscore`, or when a latent has no explanation on either side.
    """
    texts = []
    for side, latents in zip(("the submission", "the gold file"), _paired(predicted, gold), strict=True):
        if empty := [latent.id for latent in latents if not latent.explanation]:
            raise UsageError(f"{side} has no explanation of {empty[0]}.")
        texts.append([str(latent.explanation) for latent in latents])
    layer = DEFAULT_LAYER if layer is None and model == DEFAULT_MODEL else layer
    try:
        values = import_module("bert_score").score(*texts, model_type=model, num_layers=layer)
    except ImportError as error:
        raise UsageError("BERTScore needs bert-score. Install it: pip install 'sae-italian[bertscore]'.") from error
    except KeyError as error:
        raise UsageError(f"bert-score does not know which layer of {model} to compare; give --layer.") from error
    except OSError as error:
        raise UsageError(f"{model} cannot be loaded here ({error}); give --bert a local folder.") from error
    same = [one.casefold().split() == other.casefold().split() for one, other in zip(*texts, strict=True)]
    named = zip(("precision", "recall", "f1"), values, strict=True)
    means = {f"bertscore_{name}": plain(mean_interval(np.asarray(value))) for name, value in named}
    facts = {"task": 1, "latents": len(same), "model": model, "layer": layer, **means}
    return {**facts, "identical": float(np.mean(same))}


def evaluate_sequences(predicted: Sequence[Latent], gold: Sequence[Latent]) -> dict[str, Any]:
    """Return detection metrics over all sequences, and balanced accuracy averaged over latents that have both classes.

    Intervals resample latents. Raises: UsageError where a label is missing on either side, or the sequences differ.
    """
    ours, theirs = _paired(predicted, gold)
    everything = [sequence for latent in theirs for sequence in latent.sequences]
    if everything and all(one.strengths is None and not one.activating for one in everything):
        raise UsageError("the gold file is the test split with its labels hidden (activations -1, none activating).")
    labels = [_labels(*both) for both in zip(ours, theirs, strict=True)]
    counts = [[(said & kind).sum() for kind in (true, ~true) for said in (yes, ~yes)] for yes, true in labels]
    sums = np.array(counts, dtype=np.float64).reshape(-1, 4)
    metrics = {name: bootstrap(sums, lambda total, name=name: _rates(total)[name]) for name in _rates(sums)}
    both = (sums[:, :2].sum(1) > 0) & (sums[:, 2:].sum(1) > 0)
    metrics["balanced_accuracy_by_latent"] = mean_interval(_rates(sums[both])["balanced_accuracy"])
    facts = {"latents": len(ours), "sequences": int(sums.sum()), "positive": int(sums[:, :2].sum())}
    return {"task": 2, **facts, **plain(metrics)}


def _labels(mine: Latent, truth: Latent) -> Bool[np.ndarray, "2 sequences"]:
    """Return both sides' labels. Raises: UsageError unless both have the same sequences, each with its label."""
    if len(mine.sequences) != len(truth.sequences):
        raise UsageError(f"{mine.id} has {len(truth.sequences)} sequences, {len(mine.sequences)} answers.")
    for i, (one, other) in enumerate(zip(mine.sequences, truth.sequences, strict=True)):
        if one.tokens != other.tokens:
            raise UsageError(f"sequence {i} of {mine.id} is another one in the submission than in the gold file.")
        if None in (one.activating, other.activating):
            side = "the submission" if one.activating is None else "the gold file"
            raise UsageError(f"{side} has no label for sequence {i} of {mine.id}.")
    return np.array([[one.activating for one in side.sequences] for side in (mine, truth)], dtype=bool)


def _rates(sums: Float[np.ndarray, "samples 4"]) -> dict[str, np.ndarray]:
    # positives found and missed, negatives called active and not
    found, missed, false, right = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        tpr, tnr = found / (found + missed), right / (right + false)
        f1, f1_negative = (2 * n / (2 * n + missed + false) for n in (found, right))
        precision = found / (found + false)
    rates = {"balanced_accuracy": (tpr + tnr) / 2, "tpr": tpr, "tnr": tnr, "precision": precision}
    return rates | {"f1": f1, "f1_macro": (f1 + f1_negative) / 2}


def _paired(predicted: Sequence[Latent], gold: Sequence[Latent]) -> tuple[list[Latent], list[Latent]]:
    """Return both sides in the gold file's order. Raises: UsageError when one lacks latents."""
    ours, theirs = by_id(predicted), by_id(gold)
    for one, other, where in ((theirs, ours, "submission"), (ours, theirs, "gold file")):
        if missing := sorted(set(one) - set(other)):
            raise UsageError(f"the {where} lacks {len(missing)} latents, {missing[0]} first; both need the same ones.")
    return [ours[key] for key in theirs], list(theirs.values())


# --- are the data's activations those of an SAE? ----------------------------------------------------------------------


@torch.no_grad()
def replay(latents: Sequence[Latent], sae: Any, model: Any) -> dict[str, Any]:
    """Return how far the data's activations are those of `sae` on `model`, read with and without a BOS.

    Per latent the correlation over all its tokens, and whether on and off agree; then their medians, and the share of
    latents that are replayed. Task 1's strengths are whole numbers, so its correlation cannot be exactly 1.

    Raises: UsageError when no sequence has activations or could be tokenised again, or a latent is not the SAE's.
    """
    width, tokenizer = int(sae.cfg.d_sae), model.tokenizer
    prefixes: dict[str, list[int]] = {"without BOS": []}
    prefixes |= {} if tokenizer.bos_token_id is None else {"with BOS": [tokenizer.bos_token_id]}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in prefixes}
    n_known = n_aligned = 0
    for latent in latents:
        if latent.index >= width:
            raise UsageError(f"{latent.id} is not a latent of this SAE, which has {width}. Give the released one.")
        known = [one for one in latent.sequences if one.strengths is not None]
        both = [(one.strengths, token_ids(tokenizer, one)) for one in known]
        aligned = [(strengths, ids) for strengths, ids in both if strengths is not None and ids is not None]
        n_known, n_aligned = n_known + len(known), n_aligned + len(aligned)
        stored = np.concatenate([np.empty(0), *(strengths for strengths, _ in aligned)])
        for name, prefix in prefixes.items() if stored.any() else ():
            ours = []
            for _, ids in aligned:
                x = read_activations(model, torch.tensor([[*prefix, *ids]]), sae.cfg.metadata.hook_name)
                encoded = sae.encode(x.to(sae.W_dec.dtype))[0, len(prefix) :, latent.index]
                ours.append(encoded.float().cpu().numpy())
            found[name].append(_agreement(stored, np.concatenate(ours)))
    if not any(found.values()):
        raise UsageError(
            f"none of {n_known} sequences with activations could be tokenised again into its own tokens: "
            "is this the model's tokenizer, and the split not `test`?"
        )
    result: dict[str, Any] = {"latents": len(found["without BOS"]), "sequences": n_known, "tokenised_again": n_aligned}
    for name, rows in found.items():
        medians = dict(zip(_MEASURES, np.median(rows, axis=0).tolist(), strict=True))
        result[name] = {"replayed": float(np.mean([row[0] >= AGREES for row in rows])), **medians}
    return result


def token_ids(tokenizer: Any, sequence: Excerpt) -> list[int] | None:
    """Return the ids that stand behind a sequence's strings: of its text, tokenised again, when that gives its tokens.

    None when it does not (a window that begins within a word, strings that lost their spaces): it is left out, not
    guessed at.
    """

    def bare(tokens: Iterable[str]) -> list[str]:
        return [token.replace("▁", " ").replace("Ġ", " ").strip() for token in tokens]

    wanted = bare(sequence.tokens)
    text = sequence.text if sequence.text is not None else as_example(sequence).text
    for candidate in (text, f" {text}", text.lstrip()):
        ids = tokenizer(candidate, add_special_tokens=False)["input_ids"]
        if wanted in (bare(tokenizer.convert_ids_to_tokens(ids)), bare(tokenizer.decode([one]) for one in ids)):
            return list(ids)
    return None


def _agreement(stored: Float[np.ndarray, " tokens"], ours: Float[np.ndarray, " tokens"]) -> tuple[float, float, float]:
    """Return the correlation, the share of tokens on which both are on or both off, and the median relative error."""
    correlation = float(np.corrcoef(stored, ours)[0, 1]) if stored.std() > 0 and ours.std() > 0 else 0.0
    on = stored > 0
    scale = float(stored.max() / ours.max()) if ours.max() > 0 and float(stored.max()).is_integer() else 1.0
    error = float(np.median(np.abs(ours[on] * scale - stored[on]) / stored[on]))
    return correlation, float((on == (ours > 0)).mean()), error
