"""SAEDashboard's side of `bench browser`, run as a program of its own: its packages come in by PYTHONPATH.

SAEDashboard wants a HookedTransformer. It only calls it for the activations at one hook and for W_U, so it is given a
stand-in that runs the very model, with nothing else around it; its own steps are all its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


class StandIn:
    """The few things that SAEDashboard asks of a HookedTransformer, from a Hugging Face model."""

    def __init__(self, model: Any, hook_name: str):
        from transformer_lens.hook_points import HookPoint

        self.model, self.hook_name = model, hook_name
        self.hook_dict = {hook_name: HookPoint()}
        self.W_U = model.get_output_embeddings().weight.detach().float().T
        self.tokenizer = model.tokenizer
        self.forwards = 0

    def run_with_hooks(self, tokens: torch.Tensor, *, stop_at_layer: int, fwd_hooks: Any) -> torch.Tensor:
        from sae_italian.models.activations import read_activations

        self.forwards += 1
        activations = read_activations(self.model, tokens, self.hook_name)
        for name, function in fwd_hooks:
            function(activations, self.hook_dict[name])
        return activations


def measure(
    sae_folder: str, model_name: str, tokens_file: str, n_latents: int, n_top: int, per_tenth: int
) -> dict[str, Any]:
    """Return CPU seconds, forward passes and passages made, for the first `n_latents` latents."""
    from sae_dashboard.components_config import (  # pyright: ignore[reportMissingImports]
        ActsHistogramConfig,
        FeatureTablesConfig,
        LogitsHistogramConfig,
        LogitsTableConfig,
        SequencesConfig,
    )
    from sae_dashboard.data_writing_fns import save_feature_centric_vis  # pyright: ignore[reportMissingImports]
    from sae_dashboard.layout import Column, SaeVisLayoutConfig  # pyright: ignore[reportMissingImports]
    from sae_dashboard.sae_vis_data import SaeVisConfig  # pyright: ignore[reportMissingImports]
    from sae_dashboard.sae_vis_runner import SaeVisRunner  # pyright: ignore[reportMissingImports]

    from sae_italian.browser.contexts import AFTER, BEFORE
    from sae_italian.models import load_model
    from sae_italian.saes import load_sae

    torch.set_num_threads(1)
    model, sae = load_model(model_name), load_sae(sae_folder)
    tokens = torch.from_numpy(np.load(tokens_file).astype(np.int64))
    hook_name = sae.cfg.metadata.hook_name
    sequences = SequencesConfig(
        buffer=(BEFORE, AFTER), n_quantiles=10, quantile_group_size=per_tenth, top_acts_group_size=n_top
    )
    columns = [
        Column(FeatureTablesConfig()),
        Column(ActsHistogramConfig(), LogitsTableConfig(), LogitsHistogramConfig()),
        Column(sequences),
    ]
    config = SaeVisConfig(
        hook_point=hook_name,
        features=list(range(n_latents)),
        minibatch_size_features=128,
        minibatch_size_tokens=64,
        feature_centric_layout=SaeVisLayoutConfig(columns=columns),
    )
    stand_in: Any = StandIn(model, hook_name)
    started = time.process_time()
    data = SaeVisRunner(config).run(encoder=sae, model=stand_in, tokens=tokens)
    seconds = time.process_time() - started
    data.model = stand_in
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        started = time.process_time()
        save_feature_centric_vis(data, page)
        html_seconds, html_bytes = time.process_time() - started, page.stat().st_size
    shown = [len(g.seq_data) for one in data.feature_data_dict.values() for g in one.sequence_data.seq_group_data]
    return {
        "cpu_seconds": seconds,
        "html_cpu_seconds": html_seconds,
        "html_bytes_per_latent": html_bytes / n_latents,
        "latents": n_latents,
        "forwards": stand_in.forwards,
        "contexts_per_latent": sum(shown) / n_latents,
    }


if __name__ == "__main__":
    sae, model, tokens = sys.argv[1:4]
    latents, top, tenth = map(int, sys.argv[4:7])
    Path(sys.argv[7]).write_text(json.dumps(measure(sae, model, tokens, latents, top, tenth)), encoding="utf-8")
