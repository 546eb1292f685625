"""The commands of ExplainITA (EVALITA 2026)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sae_italian.cli.base import Commands, Result, positive
from sae_italian.cli.llm import client_of, counter_of, explainer_settings, llm_options, wants_llm


def add_commands(root: Commands) -> None:
    group = root.group("explainita", "ExplainITA (EVALITA 2026): write and score submissions, replay its activations")
    sub = group.add("evaluate", _evaluate, "score a submission file against the gold file")
    sub.add_argument("submission", help="a .jsonl or .parquet file, or a folder")
    sub.add_argument("gold", help="a file or folder of the same layout, or the hub's data set")
    sub.add_argument("--task", type=int, choices=(1, 2), required=True, help="1: explanations, 2: sequences")
    sub.add_argument("--split", default="test", help="of the gold folder (default: test)")
    sub.add_argument("--bert", help="BERTScore's model, a name or a folder (default: multilingual BERT)")
    sub.add_argument("--layer", type=int, help="its layer (default: bert-score's choice for that model)")
    sub = group.add("predict", _predict, "write a submission file: by rule and by word, or with an LLM")
    sub.add_argument("data", help="a file or folder, or the hub's data set")
    sub.add_argument("out", type=Path, help="the submission, .jsonl or .parquet")
    sub.add_argument("--task", type=int, choices=(1, 2), required=True, help="1: explanations, 2: sequences")
    sub.add_argument("--split", default="test", help="of the data's folder (default: test)")
    llm_options(sub)
    sub = group.add("replay", _replay, "play the data's tokens through a model and an SAE, and compare activations")
    sub.add_argument("data", help="a file or folder, or the hub's data set")
    sub.add_argument("sae", help="an SAE's folder, or release:sae_id")
    sub.add_argument("--task", type=int, choices=(1, 2), required=True)
    sub.add_argument("--split", default="train_gold")
    sub.add_argument("--model", help="default: the model in the SAE's metadata")
    sub.add_argument("--latents", type=int, help="the first so many (default: all)")


def _evaluate(options: argparse.Namespace) -> Result:
    from sae_italian.autointerp.explainita import evaluate_explanations, evaluate_sequences, read_split
    from sae_italian.autointerp.explainita.evaluate import DEFAULT_MODEL, table

    predicted = read_split(options.submission, options.task, options.split)
    gold = read_split(options.gold, options.task, options.split)
    if options.task == 1:
        result = evaluate_explanations(predicted, gold, model=options.bert or DEFAULT_MODEL, layer=options.layer)
    else:
        result = evaluate_sequences(predicted, gold)
    return result, table(result)


def _predict(options: argparse.Namespace) -> Result:
    from sae_italian.autointerp.explainita import predict, read_split, write_submission
    from sae_italian.autointerp.llm.estimate import DryClient
    from sae_italian.autointerp.llm.explainer import LLMExplainer
    from sae_italian.autointerp.llm.judge import LLMJudge
    from sae_italian.autointerp.llm.prices import PRICE_FILE
    from sae_italian.base.errors import UsageError

    if options.out.suffix not in (".jsonl", ".parquet"):
        raise UsageError(f"{options.out}: a submission is a .jsonl or a .parquet file.")
    llm = wants_llm(options)
    latents = read_split(options.data, options.task, options.split)

    def predicted(client: Any) -> Any:
        explainer = LLMExplainer(client, explainer_settings(options)) if client else None
        judge = LLMJudge(client, options.language) if client else None
        return predict(latents, options.task, explainer=explainer, judge=judge, language=options.language)

    if llm and options.estimate:
        client = DryClient(options.llm_model, counter_of(options))
        predicted(client)
        found = client.estimate(len(latents), len(latents), options.prices or PRICE_FILE)
        return found.as_dict(), found.text()
    result: dict[str, Any] = {"task": options.task, "latents": len(latents), "out": str(options.out)}
    if llm:
        ledger = options.out.with_suffix(".calls.sqlite")
        with client_of(options, ledger) as client:
            answers, unanswered = predicted(client)
        result |= {"by": f"llm:{options.llm_model}", "unanswered": unanswered, "calls": client.counts}
        result["ledger"] = str(ledger)
    else:
        answers, _ = predicted(None)
        result["by"] = "rules on the examples" if options.task == 1 else "words of the explanation"
    write_submission(options.data, options.out, options.task, answers, options.split)
    return result, "\n".join(f"{key:10} {value}" for key, value in result.items())


def _replay(options: argparse.Namespace) -> Result:
    from sae_italian.autointerp.explainita import read_split, replay
    from sae_italian.base.errors import UsageError
    from sae_italian.models import load_model
    from sae_italian.models.activations import read_activations
    from sae_italian.saes import load_sae

    positive("--latents", options.latents)
    latents = read_split(
        Path(options.data) if Path(options.data).exists() else options.data, options.task, options.split
    )
    sae = load_sae(options.sae)
    name = options.model or sae.cfg.metadata.model_name
    if not name:
        raise UsageError("the SAE's metadata does not name its model; give --model.")
    model: Any = load_model(name)
    hook = sae.cfg.metadata.hook_name
    result = replay(
        latents, sae, model.tokenizer, lambda ids: read_activations(model, ids, hook), limit=options.latents
    )
    lines = [f"{key:18} {value}" for key, value in result.items() if not isinstance(value, dict)]
    for key, value in result.items():
        if isinstance(value, dict):
            lines.append(f"{key:18} " + ", ".join(f"{name} {number:.3f}" for name, number in value.items()))
    return result, "\n".join(lines)
