"""Where the rows of a run go: into its metrics.jsonl, and to W&B when asked for, offline without a login."""

import contextlib
import json
import math
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_italian.base.errors import UsageError
from sae_italian.base.hub import WANDB_FILE, WandbRun
from sae_italian.base.storage import remove, write_json, write_text
from sae_italian.cache import FeatureCache, build_cache
from sae_italian.cache.passages import marked
from sae_italian.evaluation import evaluate
from sae_italian.evaluation.card import CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE
from sae_italian.saes import load_sae
from sae_italian.training.config import RunSpec

METRICS_FILE = "metrics.jsonl"
WEIGHTS = "sae_weights.safetensors"  # written last: where they are, the training is finished
# The reconstruction's own loss where it is told apart: the sparsity term grows by plan while its coefficient warms up.
LOSS_KEYS = ("losses/mse_loss", "losses/overall_loss")
SWEEP_ID, SWEEP_RUN_ID = "WANDB_SWEEP_ID", "WANDB_RUN_ID"  # what `wandb agent` tells the commands it starts
SAE_FILES = ("cfg.json", WEIGHTS)
SAELENS_FILES = (*SAE_FILES, "sparsity.safetensors", "runner_cfg.json")  # of a finished SAE, what SAELens uploads
OUR_FILES = ("run.json", METRICS_FILE, CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE)  # and what we add
CHECKPOINT_FILES = (*SAE_FILES, "activation_scaler.json")
N_LATENTS, N_CONTEXTS = 1000, 3  # of the table of latents; more of either make a W&B page slow
LATENT_COLUMNS = ["latent", "density", "max", "token", "token_share"]


class RunLog:
    """The log of the run whose folder is `out`: every row goes into metrics.jsonl, and to W&B within `to_wandb`.

    Without a folder, it is that of a process which another one writes for.
    """

    def __init__(self, spec: RunSpec, out: Path | None):
        self.spec = spec
        self.out: Any = out
        self.wandb_run: Any = None

    @contextlib.contextmanager
    def to_wandb(self) -> Iterator[None]:
        """Tell W&B too in the block, where the spec asks for it.

        `wandb: online` without a login, or without the server in reach, becomes offline, which one line on stderr says; so
        does another, at the end, how to send it later. A run that is resumed, and one of a sweep, goes on in its own W&B run.
        """
        if self.spec.wandb == "off":
            yield
            return
        failed, self.wandb_run = 1, self._start()
        try:
            yield
            failed = 0
        finally:
            self.wandb_run.finish(exit_code=failed)
        if self.wandb_run.offline:
            sys.stderr.write(f"W&B holds this run offline; send it with: wandb sync {self.out}/wandb/offline-*\n")

    def _start(self) -> Any:
        import wandb
        from wandb.errors import CommError

        spec, out, config = self.spec, self.out, self.spec.to_saelens()
        given: dict[str, Any] = WandbRun(None, spec.wandb_project).joined(out) | {
            "config": {**config.to_dict(), "sae_italian": spec.model_dump(mode="json")},
            "settings": wandb.Settings(console="off", silent=True, reinit="create_new"),
        }
        # a folder's W&B run has one id; to claim it anew forgets it, and a sweep's would all have one name
        if SWEEP_ID not in os.environ:
            if not (out / WANDB_FILE).is_file():
                write_json(out / WANDB_FILE, WandbRun(uuid.uuid4().hex[:8], spec.wandb_project)._asdict())
            run = WandbRun.of(out).id  # exports of its latents join the group
            given |= {"id": run, "group": run, "name": config.logger.run_name}
        if spec.wandb == "online":
            why = "nobody is logged in (`wandb login`)"
            if wandb.login(prompt=False, verify=False):
                try:
                    return wandb.init(mode="online", **given, resume="allow" if "id" in given else None)
                except CommError as error:
                    why = f"the server cannot be reached ({' '.join(str(error).split())})"
            sys.stderr.write(f"wandb: online, but {why}; the run is kept offline.\n")
        return wandb.init(mode="offline", **given)

    def __call__(self, row: dict[str, Any], step: int) -> None:
        """Tell the metrics of one step, in SAELens' names."""
        if self.out is None:
            return
        with (self.out / METRICS_FILE).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **row}) + "\n")
        if self.wandb_run:
            self.wandb_run.log(row, step=step)

    def cut(self, n_steps: int) -> None:
        """Drop the rows of step `n_steps` and after, which a resumed run writes again."""
        if self.out is not None and (file := self.out / METRICS_FILE).is_file():
            rows = [row for row in read_metrics(file) if row["step"] < n_steps]
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint(self, folder: Path, n_tokens: int) -> None:
        """Tell of the state of an SAE saved after `n_tokens`; `folder` is gone after the next one."""
        if self.wandb_run and self.spec.wandb_checkpoints:
            aliases = ["latest", f"{n_tokens}-tokens"]
            self._send("sae-checkpoint", {"n_tokens": n_tokens}, folder, CHECKPOINT_FILES, aliases)

    def evaluation(self, folder: Path, model: Any, step: int) -> None:
        """Tell the means of the evaluation card of the SAE in a folder as `eval/...`."""
        sae = load_sae(folder, device=self.spec.device)
        means = evaluate(sae, model, name=self.out.name, **self._held_out()).estimates()
        self({f"eval/{key}": mean.value for key, mean in means.items() if math.isfinite(mean.value)}, step)

    def finish(self, model: Any, cursor: Mapping[str, Any]) -> None:
        """Tell W&B, if it listens, of the finished SAE: its card, which is kept in the folder too, its latents, and where in
        the corpus the training ended."""
        if not self.wandb_run:
            return
        place = {key: value for key, value in cursor.items() if key != "packer"}  # the packer's is text and tokens
        self.wandb_run.summary.update({"corpus": {"name": self.spec.corpus, **place}})
        try:
            self._tell_card(load_sae(self.out, device=self.spec.device), model)
        except UsageError as error:
            sys.stderr.write(f"no evaluation card for W&B: {' '.join(str(error).split())}\n")
        self._send("sae", self.spec.model_dump(mode="json"), self.out, SAELENS_FILES + OUR_FILES)

    def _tell_card(self, sae: Any, model: Any) -> None:
        import wandb

        card = evaluate(sae, model, name=self.out.name, **self._held_out())
        card.save(self.out)
        built = build_cache(sae, model, out=self.out / ".latents.tmp", split="heldout", **self._held_out())
        latents: Any = latent_rows(FeatureCache.open(built), model.tokenizer)
        remove(built)
        measured = {key: x for key, x in card.estimates().items() if math.isfinite(x.value)}
        rows: Any = [[key, *x] for key, x in measured.items()]
        table = wandb.Table(columns=["metric", "value", "lo", "hi"], data=rows)
        picture = wandb.Html(card._repr_html_(), inject=False)  # in one piece, light and dark
        columns: Any = [*LATENT_COLUMNS, *(f"context {i}" for i in range(1, N_CONTEXTS + 1))]
        shown = wandb.Table(columns=columns, data=latents)
        values = {f"eval/{key}": x.value for key, x in measured.items()}
        self.wandb_run.log(values | {"eval/card": table, "eval/density": picture, "eval/latents": shown})
        self.wandb_run.summary.update({"eval/n_tokens": card.n_tokens, "eval/n_documents": card.n_documents})

    def _held_out(self) -> dict[str, Any]:
        """Return the text that the SAE is judged on."""
        spec = self.spec
        return {
            "corpus": spec.evaluate_corpus or spec.corpus,
            "n_tokens": spec.evaluate_tokens,
            "context_size": spec.context_size,
            "text_column": spec.text_column,
        }

    def _send(self, kind: str, metadata: Any, folder: Path, files: Any, aliases: list[str] | None = None) -> None:
        import wandb

        name = kind.replace("sae", f"sae-{self.wandb_run.id}", 1)
        artifact = wandb.Artifact(name, type=kind, metadata=metadata)
        for file in files:
            if (folder / file).is_file():
                artifact.add_file(str(folder / file), file)  # copied now, sent when W&B gets to it
        self.wandb_run.log_artifact(artifact, aliases=aliases)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a line that is cut short, or being written, is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def latent_rows(cache: FeatureCache, tokenizer: Any) -> list[list[Any]]:
    """Return up to N_LATENTS latents that fire, spread over all, for a table: LATENT_COLUMNS and the strongest passages.

    `token` is the one that it fires on most and `token_share` that token's share of its activation: 1 for a latent that
    is one token. The strongest token of a passage stands between asterisks.
    """
    stats, rows = cache.statistics, []
    alive = np.flatnonzero(stats["max"] > 0)
    for latent in alive[np.linspace(0, len(alive) - 1, min(N_LATENTS, len(alive))).astype(int)].tolist():
        token, share = tokenizer.decode(int(stats["token_ids"][latent][0])), float(stats["token_shares"][latent][0])
        passages = cache.latent(latent).windows("top", N_CONTEXTS).shown()
        strongest = [np.arange(len(each.values)) == each.values.argmax() for each in passages]
        texts = [" ".join(marked(*both, "**", "**").split()) for both in zip(passages, strongest, strict=True)]
        texts += [""] * (N_CONTEXTS - len(passages))
        rows.append([latent, float(stats["density"][latent]), float(stats["max"][latent]), token, share, *texts])
    return rows


def sweep_folder(default: Path) -> Path:
    """Return the folder for a training without --out: under `wandb agent` each run of a sweep has its own below it."""
    run_id = os.environ.get(SWEEP_RUN_ID)
    return default / run_id if os.environ.get(SWEEP_ID) and run_id else default
