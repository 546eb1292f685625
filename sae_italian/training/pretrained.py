"""A training that starts from a published SAE: its weights in the SAE in training, and what became of its latents.

The origin may have another activation function. What it computes is kept as far as the new one can: scale and bias of the
input are moved to where the new SAE has them, a threshold is set so that as many latents fire as the origin's k says. The
latents keep their numbers, so that `latent_map.safetensors`, written at the end, needs no matching to be read.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from sae_italian.base.errors import DataError, UsageError
from sae_italian.base.storage import atomic_path
from sae_italian.models import parse_hook_name, resolved_here
from sae_italian.saes import load_sae
from sae_italian.saes.fit import CHUNK, fit, threshold_for
from sae_italian.saes.loading import hooks_of, weights_hash
from sae_italian.training.config import SCALES, RunSpec

LATENT_MAP = "latent_map.safetensors"
SAMPLE = 8192  # tokens on which the origin is measured and thresholds are set
DRIFTED_BELOW = 0.9  # cosine of a latent with itself at the start
NEW_BELOW = 0.5  # cosine with the nearest of all latents at the start
PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec"}
# Architectures with these weights alone; the last three are ours.
TAKE_PLAIN = {"topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "standard", "jumprelu", "sparse_topk"}
TAKE_PLAIN |= {"topk_transcoder", "transcoder"}


class Origin:
    """The SAE that a run starts from; `record` is what the card says of it.

    Raises: UsageError when its model, hooks, shapes or kind are not those of the run; as `load_sae`.
    """

    def __init__(self, spec: RunSpec):
        self.name = str(spec.from_pretrained_path)
        self.sae: Any = load_sae(self.name, device=spec.device)
        self._check(spec)
        self.rows = self.sae.W_dec.detach().cpu()  # all that is kept once the training has started
        self.record: dict[str, Any] = {"sae": self.name, "weights_sha256": weights_hash(self.sae)}

    def _check(self, spec: RunSpec) -> None:
        theirs, state = self.sae.cfg, self.sae.state_dict()
        found = _facts(theirs, theirs.metadata.model_name, hooks_of(self.sae))
        wanted = _facts(spec.sae_config(), spec.model, (spec.hook_name, spec.hook_name_out or spec.hook_name))
        if state.keys() >= PLAIN and wanted["architecture"] in TAKE_PLAIN:
            found |= {name: wanted[name] for name in ("architecture", "apply_b_dec_to_input")}
        differ = [key for key in wanted if found[key] not in (None, wanted[key])]
        wrong = [f"{key} is {found[key]}, the config's {wanted[key]}" for key in differ]
        if "W_skip" in state and bool(state["W_skip"].any()):
            wrong.append("it has a skip connection, which training here does not")
        if wrong:
            why = "; ".join(wrong)
            raise UsageError(f"the SAE {self.name} cannot start this training: {why}. Change one of them.")

    @torch.no_grad()
    def start(self, sae: Any, x: Tensor, y: Tensor, scale: Any) -> None:
        """Give an SAE in training the origin's weights, before its first step.

        x [tokens, d_in], y [tokens, d_out]: raw activations, the same for an SAE. scale: by what the trainer multiplies
        them, a pair for a transcoder, None where it does not: the SAE then gives on scaled activations what the origin
        gives on raw ones.
        """
        origin, x, y = self.sae, x[:SAMPLE], y[:SAMPLE]
        if origin.cfg.normalize_activations == "expected_average_only_in":
            norm = x.float().norm(dim=-1).mean().item()
            origin.fold_activation_norm_scaling_factor(origin.cfg.d_in**0.5 / norm)
        self.record["explained_variance_before"] = fit(origin, x, y).explained_variance
        if getattr(origin.cfg, "rescale_acts_by_decoder_norm", False):
            origin.fold_W_dec_norm()
        state, own = origin.state_dict(), sae.state_dict()
        shift = int(sae.cfg.apply_b_dec_to_input) - int(origin.cfg.apply_b_dec_to_input)
        if shift:
            state["b_enc"] = state["b_enc"] + shift * (state["b_dec"] @ state["W_enc"])
        if "threshold" in own and "threshold" not in state:
            k = getattr(origin.cfg, "k", None)  # without one it is a ReLU, whose threshold is 0
            state["threshold"] = torch.full_like(own["threshold"], threshold_for(origin, x, k) if k else 0.0)
        sae.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})
        if "topk_threshold" in own:
            sae.topk_threshold.fill_(threshold_for(sae, x, sae.cfg.k))
        if scale is not None:
            mode = sae.cfg.normalize_activations
            inverse = tuple(1 / factor for factor in scale) if isinstance(scale, tuple) else 1 / scale
            sae.fold_activation_norm_scaling_factor(inverse)
            sae.cfg.normalize_activations = mode
        self.sae = None

    def resume(self, record: dict[str, Any]) -> None:
        """Take the record of a run that goes on. Raises: DataError when the origin is not what it started from."""
        if record["weights_sha256"] != self.record["weights_sha256"]:
            raise DataError(
                f"{self.name} holds other weights than this run started from. Put them back, or start anew."
            )
        self.record, self.sae = record, None

    def finish(self, W_dec: Float[Tensor, "d_sae d_out"], out: Path) -> dict[str, Any]:
        """Write the map from the latents at the start to those at the end; return the record with its summary."""
        found, summary = latent_map(self.rows.to(W_dec.device), W_dec.detach())
        with atomic_path(out / LATENT_MAP) as temporary:
            save_file(found, temporary)
        self.record |= summary
        return self.record


def _facts(cfg: Any, model: str | None, hook_names: Iterable[str]) -> dict[str, Any]:
    """Return what an SAE and the training that starts from it must share."""
    shared = {name: getattr(cfg, name) for name in ("d_in", "d_sae", "reshape_activations", "apply_b_dec_to_input")}
    mode, known = cfg.normalize_activations, resolved_here(model) if model else None
    return shared | {
        # its last part: releases write `gemma-2-2b` where others write `google/gemma-2-2b`
        "model": model and Path(known.saved_name if known else model).name.lower(),
        "hook": [parse_hook_name(name).name for name in hook_names],
        "d_out": getattr(cfg, "d_out", cfg.d_in),
        "normalize_activations": "none" if mode in SCALES[:2] else mode,
        "architecture": cfg.architecture().removeprefix("started_"),
    }


@torch.no_grad()
def latent_map(
    before: Float[Tensor, "d_sae d"], after: Float[Tensor, "d_sae d"]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return what became of each latent, by cosines of decoder directions, and a summary of it.

    By latent: `cosine` with itself at the start; `nearest`, the latent at the start it is most like now, and `cosine_nearest`.
    The summary: quantiles of `cosine`; the shares `drifted` (cosine below 0.9), `moved` (another is nearest) and `new` (none
    of the start's is within 0.5); `nearest_by_chance`, the median cosine that random directions have with their nearest.
    """
    old, new = (normalize(rows.float(), dim=-1) for rows in (before, after))
    cosine = (old * new).sum(-1)
    near, which = _nearest(new, old)
    noise = torch.randn(CHUNK, old.shape[1], generator=torch.Generator().manual_seed(0)).to(old.device)
    chance, _ = _nearest(normalize(noise, dim=-1), old)
    summary = {
        "cosine_median": cosine.median(),
        "cosine_p05": cosine.quantile(0.05),
        "drifted": (cosine < DRIFTED_BELOW).cpu().double().mean(),
        "moved": (which != torch.arange(len(which), device=which.device)).cpu().double().mean(),
        "new": (near < NEW_BELOW).cpu().double().mean(),
        "nearest_by_chance": chance.median(),
    }
    found = {"cosine": cosine.cpu(), "nearest": which.cpu(), "cosine_nearest": near.cpu()}
    return found, {key: float(value) for key, value in summary.items()}


def _nearest(rows: Float[Tensor, "n d"], among: Float[Tensor, "m d"]) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each unit row with some unit rows, and the number of that one."""
    best = [(part @ among.T).max(dim=-1) for part in rows.split(CHUNK)]
    return torch.cat([each.values for each in best]), torch.cat([each.indices for each in best])
