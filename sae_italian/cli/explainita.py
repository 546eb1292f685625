"""The commands of ExplainITA (EVALITA 2026)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import PositiveInt

import sae_italian
from sae_italian.autointerp.llm.settings import LLMOptions
from sae_italian.base.errors import UsageError
from sae_italian.base.words import read_words
from sae_italian.cli.options import Model

Task = Annotated[Literal[1, 2], Parameter(help="The task: 1 explanations, 2 sequences.")]


def evaluate(
    submission: str,
    gold: str,
    /,
    *,
    task: Task,
    split: str = "test",
    bert: str | None = None,
    layer: int | None = None,
) -> Any:
    """Score a submission file against the gold file.

    Args:
        submission: A .jsonl or .parquet file, or a folder of splits.
        gold: A file or folder of the same layout, or the hub's data set.
        split: Split of a folder that is read.
        bert: BERTScore's model, a name or a folder; default: multilingual BERT.
        layer: Layer of that model that is compared; default: bert-score's own choice.
    """
    from sae_italian.autointerp.explainita import evaluate_explanations, evaluate_sequences, read_split
    from sae_italian.autointerp.explainita.evaluate import DEFAULT_MODEL

    predicted, truth = read_split(submission, task, split), read_split(gold, task, split)
    if task == 1:
        return evaluate_explanations(predicted, truth, model=bert or DEFAULT_MODEL, layer=layer)
    return evaluate_sequences(predicted, truth)


def predict(
    data: str,
    out: Path | None = None,
    /,
    *words: str,
    task: Task,
    split: str | None = None,
    sae: str | None = None,
    model: Model = None,
    llm: Annotated[LLMOptions | None, Parameter(name="*")] = None,
) -> Any:
    """Write a submission file: by rule and by word, or with an LLM. With --sae: replay the data and compare.

    Args:
        data: A file or folder, or the hub's data set.
        out: The submission, .jsonl or .parquet; none is needed with --sae.
        words: Rare settings of the language model, key=value; with --sae n_latents=N: only the first N.
        split: Split of the data's folder; default: test, with --sae train_gold.
        sae: Play the tokens through this SAE (a folder, or release:sae_id) and say whether the data is its own; default: predict.
    """
    from sae_italian.autointerp.explainita import read_split, replay, write_submission
    from sae_italian.autointerp.explainita.data import check_format

    if sae is not None:  # nothing is written: what stands in the file's place is a setting
        limit = read_words(words if out is None else (str(out), *words), {"n_latents": PositiveInt}).get("n_latents")
        latents = read_split(data, task, split or "train_gold")[:limit]
        loaded, subject, _ = sae_italian.open_sae(sae, model, "none")
        return replay(latents, loaded, subject)
    if out is None:
        raise UsageError("a submission needs a file to be written to, such as run1.jsonl.")
    check_format(out)
    settings = (llm or LLMOptions()).with_words(words)
    latents = read_split(data, task, split or "test")
    result: dict[str, Any] = {"task": task, "latents": len(latents), "out": str(out)}
    if not settings.wants_llm:
        answers = _predicted(latents, task, settings, None).answers
        result["by"] = "rules on the examples" if task == 1 else "words of the explanation"
    elif settings.estimate:
        from sae_italian.autointerp.llm.calls import DryClient

        dry = DryClient(settings)
        _predicted(latents, task, settings, dry)
        return dry.estimate(len(latents), len(latents))
    else:
        from sae_italian.autointerp.llm.client import Client

        ledger = out.with_suffix(".calls.sqlite")
        with Client(settings, ledger) as client:
            answers, unanswered = _predicted(latents, task, settings, client)
        client.must_have_answered()
        result |= {"by": f"llm:{settings.llm_model}", "unanswered": unanswered, "calls": client.counts}
        result |= {"why": client.told()[1:], "ledger": str(ledger)}
    write_submission(data, out, task, answers, split or "test")
    return result


def _predicted(latents: Any, task: Task, settings: Any, client: Any) -> Any:
    """Return the answers to a task, those of a client's model where there is one."""
    from sae_italian.autointerp.explainita import predict as answer
    from sae_italian.autointerp.llm.askers import LLMExplainer, LLMJudge

    asked = (LLMExplainer(client), LLMJudge(client)) if client else (None, None)
    return answer(latents, task, explainer=asked[0], judge=asked[1], language=settings.language)
