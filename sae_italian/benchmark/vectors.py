"""What the probes see: activations of a model at a hook, kept on disk once, and latents pooled over words and sentences.

Tokens are kept, not their means: the mean of a sentence's latents is not the latents of its mean. A further SAE then
costs its encoding alone. Every vector is a row of one sparse pooling matrix P over tokens: P X for activations, P Z for
latents, P E for embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch.nn.utils.rnn import pad_sequence

from sae_italian.analysis.latent import codes
from sae_italian.analysis.treebank import Sentence, Word, last_tokens
from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.pace import paced, progress
from sae_italian.base.storage import atomic_path, fingerprint, read_json, write_json
from sae_italian.benchmark.material import stop
from sae_italian.corpora.packing import bos_id, tokenise
from sae_italian.models.activations import read_activations

CONTEXT = 128  # tokens of a text at most, BOS counted
BATCH = 2048  # tokens
CHUNK = 512  # tokens encoded at once
PART = 32  # batches of a file
MEAN_OF, LAST_OF = -1, -2  # in place of where a word ends
Point = tuple[int, int]  # text, and where its word ends, or MEAN_OF, LAST_OF


def model_identity(model: Any) -> dict[str, Any]:
    """Return what tells two models apart: name, revision, and a hash of some of their first and last weights."""
    parameters = list(model.parameters())
    some = [p.detach().flatten()[:4096].float().cpu().tolist() for p in (parameters[0], parameters[-1])]
    known = getattr(model, "loaded_from", {})
    return {"model": known.get("name"), "revision": known.get("revision"), "weights": fingerprint(some)}


@dataclass(frozen=True)
class Activations:
    """Activations at a hook of some texts, in files of whole texts; ids and spans are without BOS."""

    folder: Path
    order: list[list[int]]  # the texts of each batch, shortest first
    ids: list[Int[np.ndarray, " tokens"]]
    spans: list[Int[np.ndarray, "tokens 2"]]

    def parts(self) -> Iterator[tuple[list[int], Float[np.ndarray, "tokens d_in"]]]:
        """Yield the texts of each file and their tokens' activations, in that order, mapped from the disk."""
        for number, first in enumerate(range(0, len(self.order), PART)):
            file = self.folder / f"part-{number:04}.npy"
            if file.is_file():  # all of them, unless the time was over
                texts = [text for batch in self.order[first : first + PART] for text in batch]
                yield texts, np.load(file, mmap_mode="r")

    def n_tokens(self) -> int:
        """Return how many tokens there are."""
        return sum(map(len, self.ids))


def read_texts(model: Any, hook_name: str, texts: Sequence[str], folder: Path) -> Activations:
    """Return the activations of texts at a hook, read from `folder` where it holds them, else computed into it.

    A stopped computation goes on with the file it was at. Raises: DataError when the folder holds those of another model,
    of another revision of it, or of other texts.
    """
    tokens = tokenise(model.tokenizer, list(texts))
    found = [np.asarray(token)[:, : CONTEXT - 1] for token in tokens]
    ids, spans = [part[0].astype(np.int64) for part in found], [part[1:].T for part in found]
    order = _batches(sorted((i for i in range(len(ids)) if len(ids[i])), key=lambda i: len(ids[i])), ids)
    wanted = model_identity(model) | {"hook_name": hook_name, "texts": fingerprint([i.tolist() for i in ids])}
    file = folder / "manifest.json"
    if file.is_file():
        held = read_json(file)
        for key, value in wanted.items():
            if held.get(key) != value:
                raise DataError(
                    f"{folder} holds activations of another {key} ({held.get(key)}, not {value}). "
                    "Remove that folder, or give another --out."
                )
    else:
        write_json(file, wanted)
    acts = Activations(folder, order, ids, spans)
    _compute(model, hook_name, acts)
    return acts


def _batches(order: Sequence[int], ids: Sequence[np.ndarray]) -> list[list[int]]:
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * (len(ids[i]) + 1) > BATCH:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def _compute(model: Any, hook_name: str, acts: Activations) -> None:
    bos = bos_id(model.tokenizer)
    starts = list(range(0, len(acts.order), PART))
    todo = [(n, first) for n, first in enumerate(starts) if not (acts.folder / f"part-{n:04}.npy").is_file()]
    todo = [
        todo[i] for i in np.random.default_rng(0).permutation(len(todo))
    ]  # a time bound leaves texts of all lengths
    for number, first in paced(todo, "activations", len(todo), "part"):
        rows = []
        for batch in acts.order[first : first + PART]:
            padded = pad_sequence([torch.tensor([bos, *acts.ids[i]]) for i in batch], batch_first=True)
            x = read_activations(model, padded.to(model.device), hook_name)
            rows += [own[1 : len(acts.ids[i]) + 1].float().cpu().numpy() for i, own in zip(batch, x, strict=True)]
        with atomic_path(acts.folder / f"part-{number:04}.npy") as temporary, temporary.open("wb") as handle:
            np.save(handle, np.concatenate(rows))


# --- pooling ----------------------------------------------------------------------------------------------------------


class Pooling:
    """Points (text, where) as rows of P; those whose word lies beyond the context are absent."""

    def __init__(self, acts: Activations, texts: Sequence[str], points: Sequence[Point]):
        self.acts, self.rows = acts, {}
        by_text: dict[int, list[int]] = {}
        for text, where in points:
            by_text.setdefault(text, []).append(where)
        self._of_part: list[scipy.sparse.csr_array] = []
        ids: list[tuple[int, int]] = []
        for inside, _ in acts.parts():
            cells: list[tuple[int, int, float]] = []
            offset, first = 0, len(self.rows)
            for text in inside:
                for where, tokens in self._tokens(texts[text], text, by_text.get(text, ())):
                    row = self.rows[text, where] = len(self.rows)
                    cells += [(row - first, offset + token, 1 / len(tokens)) for token in tokens]
                    last = tokens[-1]
                    ids.append((acts.ids[text][last], acts.ids[text][last - 1] if last else -1))
                offset += len(acts.ids[text])
            row, column, value = (np.array(part) for part in (zip(*cells, strict=True) if cells else ((), (), ())))
            shape = (len(self.rows) - first, offset)
            self._of_part.append(scipy.sparse.csr_array((value.astype(np.float32), (row, column)), shape))
        self.ids: Int[np.ndarray, "points 2"] = np.array(ids, dtype=np.int64).reshape(-1, 2)  # last token, and its left

    def _tokens(self, text: str, index: int, wheres: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield each place and the tokens that make its vector; none for a word beyond the context."""
        spans, ends = self.acts.spans[index], [where for where in wheres if where >= 0]
        words = [Word(text.rfind(" ", 0, end) + 1, end, frozenset()) for end in ends]
        last = last_tokens(Sentence(text, words, True), spans) if words else []
        yield from ((end, [int(token)]) for end, token in zip(ends, last, strict=True) if token >= 0)
        read = [int(token) for token in np.flatnonzero(spans[:, 1] <= stop(text))] or [0]
        yield from ((where, read[-1:] if where == LAST_OF else read) for where in set(wheres) - set(ends))

    def dense(self) -> Float[np.ndarray, "points d_in"]:
        """Return the pooled activations."""
        return np.concatenate([pool @ x for pool, (_, x) in zip(self._of_part, self.acts.parts(), strict=True)])

    def embedded(self, embeddings: Float[np.ndarray, "vocabulary d"]) -> Float[np.ndarray, "points d"]:
        """Return the pooled rows of the model's embedding matrix."""
        parts = zip(self._of_part, self.acts.parts(), strict=True)
        return np.concatenate([pool @ embeddings[self._ids(inside)] for pool, (inside, _) in parts])

    def _ids(self, inside: Sequence[int]) -> Int[np.ndarray, " tokens"]:
        return np.concatenate([self.acts.ids[text] for text in inside])

    @torch.no_grad()
    def latents(self, sae: Any, what: str) -> scipy.sparse.csr_array:
        """Return the pooled latents [points, d_sae]. Raises: UsageError when the SAE reads another width."""
        found, parts = [], zip(self._of_part, self.acts.parts(), strict=True)
        bar = progress(what, total=len(self._of_part), unit="part")
        for pool, (_, x) in parts:
            bar.update(1)
            if x.shape[1] != sae.cfg.d_in:
                raise UsageError(f"the SAE reads {sae.cfg.d_in} dimensions (d_in), the activations have {x.shape[1]}.")
            used = np.flatnonzero(np.diff(pool.tocsc().indptr))  # tokens that no point needs are not encoded
            chunks = torch.from_numpy(x[used]).split(CHUNK)
            z = [scipy.sparse.csr_array(codes(sae, part).float().cpu().numpy()) for part in chunks]
            if z:
                found.append(scipy.sparse.csr_array(pool[:, used] @ scipy.sparse.vstack(z, format="csr")))
        bar.close()
        return scipy.sparse.csr_array(scipy.sparse.vstack(found, format="csr"))

    def sample(self, n: int, seed: int = 0) -> Float[np.ndarray, "n d_in"]:
        """Return activations of tokens drawn over all texts, to calibrate a random twin on."""
        rng, total, found = np.random.default_rng(seed), self.acts.n_tokens(), []
        for _, x in self.acts.parts():
            found.append(x[np.sort(rng.permutation(len(x))[: -(-n * len(x) // total)])])
        return np.concatenate(found)
