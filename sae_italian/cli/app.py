"""The command line: one table of commands, each a function that is imported when it is called.

Exit codes: 0 done, 2 the user can fix it (one line), 1 a defect of ours, 130 stopped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter

import sae_italian
from sae_italian.base.errors import SaeItalianError
from sae_italian.cli.options import Result

# name -> (function in sae_italian.cli, one line for --help). A name of two words belongs to a group.
COMMANDS: dict[str, tuple[str, str]] = {
    "models list": ("models:list_models", "names, aliases, licence, gate of the known models"),
    "models show": ("models:show_model", "dimensions, licence, hooks of one model"),
    "models check": ("models:check_model", "do the three backends agree? logits, and every layer and site"),
    "saes list": ("models:list_saes", "published SAEs: width, k, site, licence"),
    "saes show": ("models:show_sae", "an SAE's configuration: architecture, k, width, hook, what it was trained on"),
    "corpora list": ("corpora:list_corpora", "names, licence, gate, size, routes"),
    "corpora show": ("corpora:show", "route, licence, columns and known traps of a corpus, and its first documents"),
    "corpora stats": ("corpora:stats", "tokens per word, document lengths, share of Italian, what is dropped and why"),
    "corpora pretokenize": ("corpora:pretokenize", "write packed tokens that SAELens and our trainer read"),
    "browse": ("browse:browse", "the latent browser of a cache, alone or beside another SAE; the overview of a suite"),
    "cache build": ("cache:build", "cache an SAE's latents over a corpus, or several SAEs' from one forward pass"),
    "cache info": ("cache:info", "what a cache holds; --verify compares every file with its checksum"),
    "import": ("cache:import_cache", "make a feature cache of one that Delphi wrote"),
    "ioi": ("causal:ioi", "indirect objects: does a model do them, and which latents carry the name"),
    "agreement": ("causal:agreement", "Italian agreement on minimal pairs: gender, number, subject and verb"),
    "steer": ("causal:steer", "what a model writes with a latent added; --ablate: the logits that move without it"),
    "tree": ("causal:tree", "the latents of earlier layers that a latent depends on, by ablation"),
    "geometry": ("analysis:geometry", "nearest decoder directions within and between SAEs, and a map of the latents"),
    "language": ("analysis:language", "latents that detect linguistic labels, and latents of one language"),
    "shift": ("analysis:shift", "L0, explained variance and loss on longer contexts, other texts, languages or models"),
    "quickstart": ("training:quickstart", "the whole way on the embedded model: train, cache, explain, score, report"),
    "recipes": ("training:recipes", "the training configs that come with the package"),
    "train": ("training:train", "train one SAE, a transcoder, or a suite of them"),
    "evaluate": ("training:evaluate", "the evaluation card of an SAE, on held-out text"),
    "saes doctor": ("training:doctor", "does an SAE fit its model, is its training healthy? names what is wrong"),
    "saes publish": ("training:publish", "upload an SAE with its card, curves and model card to the hub"),
    "autointerp": (
        "autointerp:autointerp",
        "explain and score the latents of a cache, with controls; resumes by itself",
    ),
    "export": ("export:export", "write a cache, its explanations or an SAE in another program's format: --to FORMAT"),
    "reproduce": ("papers:reproduce", "a paper's whole evaluation on any model, or an SAE beside its baselines"),
    "explainita evaluate": ("explainita:evaluate", "score a submission file against the gold file"),
    "explainita predict": ("explainita:predict", "write a submission file; with --sae replay the data's activations"),
}
GROUPS: dict[str, str] = {
    "models": "language models: the catalogue, and whether one is loaded as it should be",
    "saes": "trained SAEs: releases, facts, the doctor, publishing",
    "corpora": "Italian text: the catalogue, statistics, tokenising ahead of time",
    "cache": "the feature cache: the activations of every latent over a corpus",
    "explainita": "the shared task ExplainITA: predictions and their evaluation",
}
# What was spelled otherwise before -> how it is spelled now. Scripts get an answer that they can be mended by.
OLD_COMMANDS: dict[str, str] = {
    "baselines": "reproduce baselines SAE ...",
    "corpora preview": "corpora show CORPUS --documents N",
    "explainita replay": "explainita predict DATA --sae SAE",
    "browse-compare": "browse CACHE --compare OTHER",
    "browse-suite": "browse SUITE CACHE...",
    "cache verify": "cache info CACHE --verify",
    "cache import": "import FOLDER (Delphi's format alone; exported datasets are not read back)",
    "ablate": "steer --ablate",
    "curves": "saes doctor RUN",
    "scores": "autointerp CACHE --encoder FOLDER --subject",
    "cache export": "export CACHE --to delphi (or datasets)",
    "autointerp export": "export CACHE --to parquet (or jsonl, wandb-tables)",
    "saes export": "export SAE --to jumprelu",
}
# Options that are words now, by the commands that had them.
WORDS: dict[str, str] = {
    "": "concurrency=N key_env=NAME prices=FILE context_tokens=N shown=top|deciles promoted=true llm_tokenizer=NAME "
    "timeout=SECONDS",
    "corpora": "split=NAME on_broken=skip min_chars=N windows_per_shard=N",
    "browse": "other_sae=SAE",
    "cache": "split=NAME windows_per_shard=N",
    "ioi": "name_tokens=N",
    "tree": "branches=N contexts=N",
    "language": "context_size=N text_column=NAME",
    "shift": "packed=true context_size=N text_column=NAME",
    "quickstart": "card_tokens=N",
    "export": "model_id=NAME set=NAME suffix=NAME creator=ID creator_name=NAME splits=N hookpoint=NAME",
}
OLD_OPTIONS: dict[str, str] = {
    f"{command} --{word.partition('=')[0].replace('_', '-')}".strip(): f"the word {word}"
    for command, words in WORDS.items()
    for word in words.split()
} | {
    "corpora -n": "--documents",
    "corpora --picture": "--out",
    "corpora --no-bos": "the word prepend_bos=false",
    "corpora --workers": "gone: all CPUs tokenise",
    "autointerp --latents": "--n-latents",
    "import --from": "left out: Delphi's is the one format that is read",
    "ioi --lang": "--language",
    "ioi --pairs": "--n-pairs",
    "agreement --pairs": "--pairs-file",
    "agreement --n": "--check",
    "agreement --patched": "--n-pairs",
    "shift --corpora": "--buckets",
    "shift --models": "--buckets",
    "quickstart --cache-tokens": "--tokens",
    "quickstart --latents": "--n-latents",
}


def build() -> App:
    """Return the application; no command is imported yet."""
    app = App(
        name="sae-italian",
        help="Sparse autoencoders on Italian language models, one command each.",
        help_epilogue="--json, after any command, prints its result as JSON.",
        version=sae_italian.__version__,
        suppress_keyboard_interrupt=False,  # `main` says what is kept
        default_parameter=Parameter(negative=""),
    )
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for name, (target, text) in COMMANDS.items():
        *group, verb = name.split()
        (groups[group[0]] if group else app).command(f"sae_italian.cli.{target}", name=verb, help=text)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--json"]
    try:
        _quiet_libraries()
        if " ".join(words[:2]) in OLD_COMMANDS:  # `autointerp export`: its first word alone is a command still
            return _fail(_renamed(words), 2)
        result = build()(words, exit_on_error=False, print_error=False, result_action="return_value")
        return _show(result, as_json="--json" in given) if isinstance(result, tuple) else 0
    except SaeItalianError as error:
        return _fail(error, error.exit_code)
    except CycloptsError as error:
        return _fail(_renamed(words) or error, 2)
    except KeyboardInterrupt as stop:
        return _fail(f"stopped; {stop or 'finished parts are kept, --resume continues'}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}; finished parts are kept.", 2)


def _show(result: tuple[Any, ...], as_json: bool) -> int:
    value, text, failure = Result(*result)
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str) if as_json else text)
    if failure:
        raise failure
    return 0


def _fail(why: object, code: int) -> int:
    print(f"sae-italian: {' '.join(str(why).split())}", file=sys.stderr)
    return code


def _renamed(words: list[str]) -> str | None:
    """Return how a command or option that was renamed is spelled now, None where nothing was."""
    for length in (2, 1):
        old = " ".join(words[:length])
        if old in OLD_COMMANDS:
            return f"`{old}` is now `{OLD_COMMANDS[old]}`."
    for word in words:
        name = word.split("=")[0]
        for key in (f"{words[0]} {name}", name):
            if key in OLD_OPTIONS:
                return f"{name} is now {OLD_OPTIONS[key]}."
    return None


def _quiet_libraries() -> None:
    """Keep other libraries' notices off a terminal that shows ours; what the environment asks for wins."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
