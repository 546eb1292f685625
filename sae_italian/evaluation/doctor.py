"""The doctor: does this SAE belong to this model, at this hook, on this scale, with this tokenizer?

Every check is pass, warn or fail, and says what was found, what was expected and what to do. Bounds are rules of thumb
(an SAE worth its name explains most of the variance and keeps most of the loss), except where a repair is found that
would do clearly better: then the fault is named.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sae_italian.base.errors import DataError, UsageError
from sae_italian.corpora import Split
from sae_italian.corpora.packing import bos_id, special_mask
from sae_italian.evaluation import diagnosis as measure
from sae_italian.evaluation.evaluate import Windows
from sae_italian.evaluation.evaluate import measure as measure_windows
from sae_italian.models import parse_hook_name, resolve, resolved_here
from sae_italian.models.loading import bos_count
from sae_italian.saes import hooks_of
from sae_italian.saes.fit import Fit, fit, threshold_for
from sae_italian.saes.loading import check_hooks, check_sae

Status = Literal["pass", "warn", "fail"]
CLEARLY = 0.03  # of explained variance: a repair that gains more names a fault
N_REPAIR_TOKENS = 512
LOSS_WINDOWS, WINDOWS_AT_ONCE = 32, 16  # whose losses are measured


@dataclass(frozen=True)
class Finding:
    """One finding."""

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass
class Diagnosis:
    """All findings on one SAE and model; `measures` holds the figures behind them, unrounded."""

    sae: str
    model: str
    corpus: str
    n_tokens: int = 0
    checks: list[Finding] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        found = {check.status for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    def check(self, name: str) -> Finding:
        return next(check for check in self.checks if check.name == name)

    def text(self) -> str:
        head = f"{self.sae} on {self.model}, {self.n_tokens:,} tokens of {self.corpus}: {self.status}"
        lines = [
            f"{c.status:5} {c.name:22} {c.found}" + (f"\n{'':29}-> {c.remedy}" if c.remedy else "") for c in self.checks
        ]
        return "\n".join([head, "", *lines])


@torch.no_grad()
def examine(
    sae: Any,
    model: Any,
    corpus: str,
    *,
    split: Split = "all",
    n_tokens: int = 8192,
    context_size: int | None = None,
    text_column: str = "text",
    name: str = "",
    tokens: Tensor | None = None,
) -> Diagnosis:
    """Return the report on `sae` and `model` (backend `hf`) over a sample of a corpus.

    `tokens` [windows, context], when given, is looked at instead of the corpus: windows of your own pipeline.
    Raises: UsageError when the corpus is too short for the sample.
    """
    metadata = sae.cfg.metadata
    facts = getattr(model, "loaded_from", {})
    report = Diagnosis(name or str(metadata.model_name), str(facts.get("name", metadata.model_name)), str(corpus))
    report.checks += _model_checks(sae, facts)
    try:
        check_sae(sae)
        check_hooks(sae, model)
    except UsageError as error:
        report.checks.append(finding_of(error))
        return report
    if tokens is None:
        longest = getattr(model.config, "max_position_embeddings", math.inf)
        context = int(min(context_size or metadata.context_size or 128, longest))
        blocks = measure.blocks_of(model, corpus, split, n_tokens, context, text_column)
        tokens = torch.cat([torch.from_numpy(block.tokens) for block in blocks])
    report.checks.append(_bos_check(sae, model, tokens))
    highest, rows = int(tokens.max()), model.config.vocab_size
    if highest >= rows:
        found, remedy = f"token id {highest} in a model of {rows} rows", "it is another model's: load this model's own"
        report.checks.append(Finding("tokenizer", "fail", found, remedy))
        return report
    keep = torch.from_numpy(~special_mask(tokens.numpy(), model.tokenizer))
    sample = measure.take_sample(sae, model, tokens, keep)
    report.n_tokens = len(sample.x)
    for checks in (_loss_checks, _fit_checks, _repair_checks):
        report.checks += checks(sae, model, sample, report.measures)
    return report


def finding_of(error: UsageError) -> Finding:
    """Return what an SAE, or a model and an SAE, were refused for."""
    if "tokenizer" in str(error):
        return Finding("tokenizer", "fail", str(error), "it is another model's: load this model's own")
    if not isinstance(error, DataError):
        return Finding("hook and layer", "fail", str(error), "use the model and the hook it was trained on")
    remedy = "store W_dec as [d_sae, d_in]: transpose it" if "transposed" in str(error) else "write its files anew"
    return Finding("weights", "fail", str(error), remedy)


def _model_checks(sae: Any, facts: dict[str, Any]) -> Iterator[Finding]:
    trained_on, used = sae.cfg.metadata.model_name, facts.get("name")
    if trained_on and used:
        known = resolved_here(trained_on)
        trained_on = known.saved_name if known else str(trained_on)
        same = trained_on == used
        yield Finding("model", "pass" if same else "warn", f"trained on {trained_on}, looked at on {used}",
                    "" if same else "a fine-tune is fair game; else load the model it was trained on")  # fmt: skip
    theirs, ours = sae.cfg.metadata.model_revision, facts.get("revision")
    if theirs and ours and theirs != ours:
        yield Finding("revision", "warn", f"trained on revision {theirs}, this is {ours}", f"load {used}@{theirs}")
    for difference in facts.get("differences", ()):
        yield Finding("catalogue", "warn", difference, "the loaded config is used; is this the model you mean?")


def _bos_check(sae: Any, model: Any, tokens: Tensor) -> Finding:
    """Compare what the tokenizer adds by itself, and what opens the windows, with what model and SAE were trained on."""
    tokenizer, metadata, facts = model.tokenizer, sae.cfg.metadata, getattr(model, "loaded_from", {})
    entry = resolve(facts["name"]).entry if facts.get("name") else None
    by_family = model.config.model_type in ("mistral", "llama") and tokenizer.bos_token_id is not None
    expected = by_family if entry is None or entry.bos is None else entry.bos
    bos, n = bos_id(tokenizer), len(tokens)
    opened = int((tokens[:, 0] == bos).sum())
    doubled = int(((tokens[:, :-1] == bos) & (tokens[:, 1:] == bos)).any(1).sum())
    added, trained_with = bos_count(tokenizer), metadata.prepend_bos is not False
    found = f"tokenizer adds {added}, {opened} of {n} windows open with BOS, {doubled} hold two in a row"
    if added > 1 or doubled:
        remedy = "BOS is doubled: tokenise with add_special_tokens=False, or remove it from the text or post-processor"
    elif expected and added == 0:
        remedy = "BOS is missing: this model was trained with one; load its own tokenizer, or set add_bos_token=True"
    elif trained_with and opened < n:
        remedy = "BOS is missing: the SAE was trained on windows that open with one; prepend it"
    elif not trained_with and opened == n:
        return Finding("bos", "warn", found, "the SAE was trained on windows without BOS (prepend_bos is false)")
    else:
        remedy = ""
    return _verdict("bos", bool(remedy), found, remedy)


def _verdict(name: str, bad: bool, found: str, remedy: str) -> Finding:
    return Finding(name, "fail", found, remedy) if bad else Finding(name, "pass", found)


def _graded(name: str, value: float, good: float, poor: float, remedy: str, shown: str | None = None) -> Finding:
    status: Status = "pass" if value >= good else "warn" if value >= poor else "fail"
    return Finding(name, status, shown or f"{value:.4f}", "" if status == "pass" else remedy)


def _loss_checks(sae: Any, model: Any, sample: measure.Sample, measures: dict[str, Any]) -> Iterator[Finding]:
    """Compare the losses of the model itself, with the SAE in place, and with its output set to zero."""
    sums: Counter[str] = Counter()
    parts = (rows[:LOSS_WINDOWS].split(WINDOWS_AT_ONCE) for rows in (sample.tokens, sample.keep))
    for tokens, keep in zip(*parts, strict=True):
        some = Windows(tokens, keep, np.zeros(int(keep.sum()), int))
        rows, *_ = measure_windows(sae, model, *hooks_of(sae), some, with_loss=True)
        sums.update({name: float(column.sum()) for name, column in rows.items()})
    clean, with_sae, ablated = (sums[name] / sums["n_loss"] for name in ("ce", "ce_sae", "ce_zero"))
    recovered = (ablated - with_sae) / (ablated - clean)
    # what a model without context could reach: the entropy of the sample's own token frequencies, in nats
    counts = torch.unique(sample.tokens[sample.keep], return_counts=True)[1].cpu().double()
    unigram = torch.distributions.Categorical(counts).entropy().item()
    found = {"clean": clean, "with_sae": with_sae, "ablated": ablated, "unigram": unigram, "recovered": recovered}
    measures["losses"] = found
    bad = not clean < unigram
    remedy = "the model does not read this text: the tokenizer is that of another model, or the weights are untrained"
    text = f"loss {clean:.2f} nats per token; guessing by frequency gives {unigram:.2f}"
    yield _verdict("tokenizer", bad, text, remedy)
    shown = f"{recovered:.4f} (loss {clean:.3f}, with the SAE {with_sae:.3f}, without {ablated:.3f})"
    if ablated - clean < 0.01:
        remedy = "setting this hook to zero costs the model nothing: no test of the SAE"
        yield Finding("ce recovered", "warn", shown, remedy)
    else:
        yield _graded("ce recovered", recovered, 0.7, 0.3, "see the failed checks, else train longer or wider", shown)


def _fit_checks(sae: Any, model: Any, sample: measure.Sample, measures: dict[str, Any]) -> Iterator[Finding]:
    found = fit(sae, sample.x, sample.y)
    measures["fit"] = found._asdict()
    remedy = "see the failed checks, else train longer, or with more latents or a higher k"
    yield _graded(
        "explained variance", found.explained_variance, 0.5, 0.2, remedy, f"{found.explained_variance:.4f} (centred)"
    )
    shown = f"{found.explained_variance_uncentred:.4f} (uncentred, as Llama Scope)"
    yield _graded("explained variance u", found.explained_variance_uncentred, 0.5, 0.2, remedy, shown)
    yield _l0_check(sae, sample, found.l0)
    yield _dead_check(sae, sample, found)


def _l0_check(sae: Any, sample: measure.Sample, l0: float) -> Finding:
    """Compare L0 with the k that the SAE's config or metadata records, or with a hundredth of its latents."""
    metadata, d_sae, threshold = sae.cfg.metadata, sae.cfg.d_sae, getattr(sae, "threshold", None)
    given = (getattr(sae.cfg, "k", None), metadata.k, metadata.top_k, metadata.expected_l0)
    k = next((float(value) for value in given if value), None)
    fix = "retrain, or look at the failed checks"
    if threshold is not None:
        wanted = k or d_sae / 100
        better = threshold_for(sae, sample.x, wanted)
        fix = f"set every threshold to {better:.4g} (L0 {wanted:.0f} on this sample)"
        if not bool((threshold > 0).any()):
            return Finding("l0", "fail", f"{l0:.1f} latents per token; the JumpReLU has no threshold (all 0)", fix)
    found = f"{l0:.1f} latents per token of {d_sae:,}, k is " + (f"{k:g}" if k else "not recorded")
    if k is None:
        return _verdict("l0", l0 >= 0.1 * d_sae, found, f"not sparse; {fix}")
    off = max(l0, 1e-9) / k
    if 0.8 <= off <= 1.25:
        return Finding("l0", "pass", found)
    return Finding("l0", "warn" if 0.5 <= off <= 2 else "fail", found, fix)


def _dead_check(sae: Any, sample: measure.Sample, fitted: Fit) -> Finding:
    share, n = fitted.dead, len(sample.x)
    found = f"{share:.1%} of {sae.cfg.d_sae:,} latents never fired in {n:,} tokens"
    if n * fitted.l0 / sae.cfg.d_sae < 20:
        return Finding("dead latents", "pass", found + " (too few to judge; a larger --tokens would)")
    return _graded("dead latents", -share, -0.5, -0.9, "train with an auxiliary loss, or narrower", found)


def _repair_checks(sae: Any, model: Any, sample: measure.Sample, measures: dict[str, Any]) -> Iterator[Finding]:
    step = max(1, len(sample.x) // N_REPAIR_TOKENS)
    few = sample._replace(x=sample.x[::step][:N_REPAIR_TOKENS], y=sample.y[::step][:N_REPAIR_TOKENS])
    now, mode = fit(sae, few.x, few.y).explained_variance, getattr(sae.cfg, "normalize_activations", "none")
    by_token = mode in ("layer_norm", "constant_norm_rescale")  # decoding needs the token encoded
    alone = Finding("norm scale", "pass", f"each token is scaled by itself ({mode}): no constant factor is looked for")
    yield alone if by_token else _scale_check(sae, few, now, mode, measures)
    yield _layer_check(sae, model, sample, measures)
    yield _decoder_check(sae, few, now, measures)
    if not by_token:
        yield _gain_check(sae, few, now, measures)


def _scale_check(sae: Any, few: measure.Sample, now: float, mode: str, measures: dict[str, Any]) -> Finding:
    """Look for a constant factor on the SAE's input, on its output, or left out: normalisation that was not folded in."""
    scale, best = measure.best_scale(sae, few)
    out_scale, out_gain = measure.best_output_scale(sae, few)
    norm = few.x.norm(dim=-1).mean().item()
    measures["norm_scale"] = {
        "best_factor": scale,
        "explained_variance": best.explained_variance,
        "best_output_factor": out_scale,
        "output_gain": out_gain,
        "mean_norm": norm,
    }
    if best.explained_variance - now > max(CLEARLY, out_gain) and not 0.8 < scale < 1.25:
        found = f"and {best.explained_variance:.3f} when they are multiplied by {scale:.3g} first"
        remedy = f"fold the scale in: sae.fold_activation_norm_scaling_factor({scale:.4g}), once"
    elif out_gain > CLEARLY and not 0.8 < out_scale < 1.25:
        found = f"and {now + out_gain:.3f} when the latents' part of the output is multiplied by {out_scale:.3g}"
        remedy = f"a scale was folded into one side only: multiply W_dec by {out_scale:.4g}, or fold from the originals"
    elif mode in ("expected_average_only_in", "covariance_whitening"):
        found, factor = f"trained on normalised activations ({mode}), not folded in", sae.cfg.d_in**0.5 / norm
        remedy = f"fold it in: sae.fold_activation_norm_scaling_factor({factor:.4g}) on this sample's norm"
    else:
        found, remedy = "and no constant factor would do better", ""
    found = f"activations of norm {norm:.1f}; explains {now:.3f}, {found}"
    return _verdict("norm scale", bool(remedy), found, remedy)


def _layer_check(sae: Any, model: Any, sample: measure.Sample, measures: dict[str, Any]) -> Finding:
    hook_in = parse_hook_name(sae.cfg.metadata.hook_name)
    by_layer = measure.fit_by_layer(sae, model, sample, 4 * N_REPAIR_TOKENS)
    measures["explained_variance_by_layer"] = by_layer
    best, here = max(by_layer, key=lambda layer: by_layer[layer]), hook_in.layer
    found = f"{hook_in.name} is the layer that fits best ({by_layer[here]:.3f})"
    if bad := best != here and by_layer[best] - by_layer[here] > CLEARLY and by_layer[best] > 0:
        found = f"{hook_in.name} explains {by_layer[here]:.3f}, layer {best} would explain {by_layer[best]:.3f}"
    return _verdict("hook and layer", bad, found, f"wrong layer: set hook_name to blocks.{best}.{hook_in.legacy}")


def _decoder_check(sae: Any, few: measure.Sample, now: float, measures: dict[str, Any]) -> Finding:
    relaid = measure.fit_relaid(sae, few).explained_variance
    measures["explained_variance_decoder_relaid"] = relaid
    found = f"W_dec is [{', '.join(map(str, sae.W_dec.shape))}], latents in rows"
    if bad := relaid - now > CLEARLY and relaid > 0:
        found = f"W_dec explains {now:.3f} as it is and {relaid:.3f} when its numbers are laid out the other way"
    return _verdict("decoder layout", bad, found, "W_dec is transposed: store it as [d_sae, d_in], row i latent i")


def _gain_check(sae: Any, few: measure.Sample, now: float, measures: dict[str, Any]) -> Finding:
    other = measure.fit_reselected(sae, few)
    gains, best = measure.best_gains(sae, few)
    gains = gains.clamp(1e-3, 1e3).log()
    middle, spread = gains.median().item(), gains.std().item() if len(gains) > 1 else 0.0
    gain, varying, norms = math.exp(middle), math.exp(spread), sae.W_dec.detach().norm(dim=-1)
    measures["gains"] = {"median": gain, "spread": varying, "explained_variance": best.explained_variance}
    measures["decoder_norm"] = {"mean": norms.mean().item(), "std": norms.std().item()}
    better = f"explains {now:.3f}; {best.explained_variance:.3f}"
    remedy = "the decoder's norm is folded twice or not at all: load the original weights and fold once"
    gained = best.explained_variance - now > 0.1
    if other is not None and other.explained_variance - now > CLEARLY:
        reselected = f"explains {now:.3f}; {other.explained_variance:.3f}"
        found = f"{reselected} when the decoder's norm enters the top k the other way"
    elif gained and varying > 1.25:
        found = f"{better} were every latent scaled by a factor of its own (typically {gain:.2g}, varying {varying:.2g}-fold)"
    elif gained and abs(middle) > math.log(1.25):
        found = f"{better} with the decoder multiplied by {gain:.3g}"
        remedy = f"the output is on another scale: multiply W_dec by {gain:.3g}"
    else:
        found, remedy = f"latents are on the decoder's scale (norms {norms.mean():.3g} +- {norms.std():.2g})", ""
    return _verdict("decoder norm", bool(remedy), found, remedy)
