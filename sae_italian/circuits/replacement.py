"""A set of transcoders as a whole: how well each explains its MLP, and the model's loss with all MLPs replaced at once.

With all layers replaced, each transcoder reads what the earlier ones wrote: errors add up, which no layer by itself shows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_italian.analysis.latent import codes, special
from sae_italian.base.pace import paced
from sae_italian.base.report import shown, table
from sae_italian.base.statistics import Estimate, bootstrap
from sae_italian.circuits.edges import layers_of
from sae_italian.evaluation.diagnosis import blocks_of
from sae_italian.models.activations import logits_at, read_many, replaced
from sae_italian.saes import hooks_of
from sae_italian.saes.baselines import random_twin
from sae_italian.saes.fit import decoded, fit

WINDOWS = 8  # of a pass that is read
LOGITS = 2**26  # numbers of logits that are held at once


class LayerFit(NamedTuple):
    """One layer's transcoder by itself, over the tokens."""

    layer: int
    l0: float
    explained_variance: float  # centred
    dead: float


class SetReport(NamedTuple):
    """A set of transcoders on a model and a text; losses in nats per token, intervals over windows."""

    layers: tuple[LayerFit, ...]
    n_tokens: int
    ce: Estimate
    ce_replaced: Estimate
    ce_random: Estimate  # with random twins of the transcoders
    ce_zero: Estimate  # with what these layers' MLPs write taken away
    recovered: Estimate  # (ce_zero - ce_replaced) / (ce_zero - ce)
    recovered_random: Estimate

    def text(self) -> str:
        rows = [(f.layer, f"{f.l0:.1f}", f"{f.explained_variance:.3f}", f"{f.dead:.1%}") for f in self.layers]
        losses = [
            ("the model's own", shown(self.ce, ".3f"), ""),
            ("these transcoders", shown(self.ce_replaced, ".3f"), shown(self.recovered, ".3f")),
            ("random transcoders", shown(self.ce_random, ".3f"), shown(self.recovered_random, ".3f")),
            ("nothing", shown(self.ce_zero, ".3f"), "0"),
        ]
        return (
            f"{table('layer | L0 | explained variance | never active', rows)}\n\n"
            f"{table('MLPs of all these layers at once | CE loss | recovered', losses)}\n\n{self.n_tokens:,} tokens"
        )


@torch.no_grad()
def examine_set(
    saes: Sequence[Any],
    model: Any,
    corpus: str,
    *,
    n_tokens: int = 8192,
    context_size: int | None = None,
    text_column: str = "text",
    seed: int = 0,
) -> SetReport:
    """Return the report on held-out text. Raises: UsageError as `layers_of`, and for a corpus that is too short."""
    by_layer = layers_of(saes, model)
    context = int(context_size or saes[0].cfg.metadata.context_size or 128)
    blocks = blocks_of(model, corpus, "heldout", n_tokens, context, text_column)
    windows = torch.from_numpy(np.concatenate([block.tokens for block in blocks])).to(model.device)
    silent = special(windows, model.tokenizer)
    fits, twins = [], {}
    hooks = [hook for sae in by_layer.values() for hook in hooks_of(sae)]
    parts = [read_many(model, tokens, hooks) for tokens in windows.split(WINDOWS)]  # of one pass for all layers
    for layer, sae in sorted(by_layer.items()):
        x, y = (torch.cat([part.pop(hook) for part in parts])[~silent].to(sae.dtype) for hook in hooks_of(sae))
        found = fit(sae, x, y)
        fits.append(LayerFit(layer, found.l0, found.explained_variance, found.dead))
        twins[layer] = random_twin(sae, seed, lambda x=x: x)
    size = max(1, LOGITS // (context * model.config.vocab_size))
    sums = []
    for some in paced(torch.arange(len(windows)).split(size), "losses", len(windows), "window", size=len):
        ways = (None, by_layer, twins, dict.fromkeys(by_layer))
        losses = [_losses(model, windows[some], silent[some], way) for way in ways]
        sums.append(torch.cat([losses[0], *(loss[:, :1] for loss in losses[1:])], dim=1))
    columns = torch.cat(sums).double().numpy()  # loss, tokens, replaced, random, zero
    found = [bootstrap(columns[:, [i, 1]], lambda s: s[:, 0] / s[:, 1]) for i in (0, 2, 3, 4)]
    found += [bootstrap(columns[:, [0, i, 4]], lambda s: (s[:, 2] - s[:, 1]) / (s[:, 2] - s[:, 0])) for i in (2, 3)]
    return SetReport(tuple(fits), int(columns[:, 1].sum()), *found)


def _losses(
    model: Any, tokens: Int[Tensor, "windows pos"], silent: Bool[Tensor, "windows pos"], way: Mapping[int, Any] | None
) -> Float[Tensor, "windows 2"]:
    """Return the loss of each window and of how many tokens it is, special ones left out."""
    wanted = torch.zeros_like(silent)
    wanted[:, :-1] = ~silent[:, 1:] & ~silent[:, :-1]
    with with_transcoders(model, way or {}, silent):
        logits = logits_at(model, tokens, wanted).float()
    loss = logits.new_zeros(wanted.shape)
    loss[wanted] = torch.nn.functional.cross_entropy(logits, tokens.roll(-1, 1)[wanted], reduction="none")
    return torch.stack([loss.sum(1), wanted.sum(1).to(loss)], dim=1).cpu()


@contextmanager
def with_transcoders(model: Any, by_layer: Mapping[int, Any], silent: Bool[Tensor, "windows pos"]) -> Iterator[None]:
    """Put each layer's transcoder in the place of its MLP (None: nothing), but at special tokens, where the MLP stays."""
    reads: dict[int, Tensor] = {}

    def write(layer: int, sae: Any, out: Tensor) -> Tensor:
        told = torch.zeros_like(out)
        if sae is not None:
            told = decoded(sae, codes(sae, reads[layer]), reads[layer].to(sae.dtype)).to(out)
        return torch.where(silent[..., None], out, told)

    with ExitStack() as stack:
        for layer, sae in by_layer.items():
            if sae is not None:
                keep = partial(reads.__setitem__, layer)
                stack.enter_context(replaced(model, sae.cfg.metadata.hook_name, keep))
            stack.enter_context(replaced(model, f"blocks.{layer}.hook_mlp_out", partial(write, layer, sae)))
        yield
