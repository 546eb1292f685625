"""Where the rows of a run go besides its own metrics.jsonl: to W&B when asked for, offline without a login."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae_italian.base.storage import read_json, write_json
from sae_italian.evaluation.card import CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE, EvaluationCard
from sae_italian.training.config import RunSpec

WANDB_FILE = "wandb.json"  # in a run's folder: the id of its W&B run, which a resumed training continues
SWEEP_ID, SWEEP_RUN_ID = "WANDB_SWEEP_ID", "WANDB_RUN_ID"  # what `wandb agent` tells the commands it starts
SAE_FILES = ("cfg.json", "sae_weights.safetensors")
SAELENS_FILES = (*SAE_FILES, "sparsity.safetensors", "runner_cfg.json")  # of a finished SAE, what SAELens uploads
OUR_FILES = ("run.json", "metrics.jsonl", CARD_JSON, CARD_MARKDOWN, DENSITY_PICTURE)  # and what we add
CHECKPOINT_FILES = (*SAE_FILES, "activation_scaler.json")


class RunLog:
    """What is told of a run while it goes on: everything to the W&B run `wandb_run`, or nothing where that is None."""

    def __init__(self, spec: RunSpec, wandb_run: Any = None):
        self.spec, self.wandb_run = spec, wandb_run

    def __call__(self, row: Mapping[str, Any], step: int) -> None:
        """Tell the metrics of one step, in SAELens' names."""
        if self.wandb_run:
            self.wandb_run.log(dict(row), step=step)

    def checkpoint(self, folder: Path, n_tokens: int) -> None:
        """Tell of the state of an SAE saved after `n_tokens`; `folder` is gone after the next one."""
        if self.wandb_run and self.spec.wandb_checkpoints:
            aliases, metadata = ["latest", f"{n_tokens}-tokens"], {"n_tokens": n_tokens}
            self._send("-checkpoint", "sae-checkpoint", metadata, folder, CHECKPOINT_FILES, aliases)

    def finish(self, folder: Path, card: EvaluationCard | None, cursor: Mapping[str, Any]) -> None:
        """Tell of a finished SAE in `folder`, its card, and where the training ended in its corpus."""
        if not self.wandb_run:
            return
        place = {key: value for key, value in cursor.items() if key != "packer"}  # the packer's is text and tokens
        self.wandb_run.summary.update({"corpus": {"name": self.spec.corpus, **place}})
        if card is not None:
            measured = {key: x for key, x in card.estimates().items() if x.value == x.value}
            self.wandb_run.log({f"eval/{key}": x.value for key, x in measured.items()})
            bounds = {f"eval/{key}_{end}": getattr(x, end) for key, x in measured.items() for end in ("lo", "hi")}
            self.wandb_run.summary.update(
                bounds | {"eval/n_tokens": card.n_tokens, "eval/n_documents": card.n_documents}
            )
        self._send("", "sae", self.spec.model_dump(mode="json"), folder, SAELENS_FILES + OUR_FILES, None)

    def _send(self, suffix: str, kind: str, metadata: Any, folder: Path, files: Any, aliases: Any) -> None:
        import wandb

        artifact = wandb.Artifact(f"sae-{self.wandb_run.id}{suffix}", type=kind, metadata=metadata)
        for file in files:
            if (folder / file).is_file():
                artifact.add_file(str(folder / file), file)  # copied now, sent when W&B gets to it
        self.wandb_run.log_artifact(artifact, aliases=aliases)


@contextlib.contextmanager
def open_logger(spec: RunSpec, config: Any, out: Path) -> Iterator[RunLog]:
    """Yield the log of a run whose folder is `out`: W&B when the spec asks for it, else one that tells nobody.

    `wandb: online` without a login, or without the server in reach, becomes offline, which one line on stderr says;
    `wandb sync` sends it later. A run that is resumed, and one of a sweep, goes on in its own W&B run.
    """
    if spec.wandb == "off":
        yield RunLog(spec)
        return
    run = _start(spec, config, out)
    try:
        yield RunLog(spec, run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _start(spec: RunSpec, config: Any, out: Path) -> Any:
    import wandb
    from wandb.errors import CommError

    given: dict[str, Any] = {
        "project": spec.wandb_project,
        "name": config.logger.run_name,
        "config": {**config.to_dict(), "sae_italian": spec.model_dump(mode="json")},
        "settings": wandb.Settings(console="off", silent=True, reinit="create_new"),
        "dir": str(out.resolve()),  # wandb works in a process and a folder of its own
    }
    if SWEEP_ID not in os.environ:
        given["id"] = _run_id(out)
    if spec.wandb == "online":
        if wandb.login(prompt=False, verify=False):
            try:
                return wandb.init(mode="online", **given, resume="allow" if "id" in given else None)
            except CommError as error:
                why = f"the server cannot be reached ({error})"
        else:
            why = "nobody is logged in (`wandb login`)"
        line = f"wandb: online, but {why}; the run is kept offline, `wandb sync {out}/wandb/offline-*` sends it."
        sys.stderr.write(" ".join(line.split()) + "\n")
    return wandb.init(mode="offline", **given)


def _run_id(out: Path) -> str:
    """Return the id of the folder's W&B run, made at the first call; claiming the folder anew forgets it."""
    file = out / WANDB_FILE
    if not file.is_file():
        write_json(file, {"id": uuid.uuid4().hex[:8]})
    return read_json(file)["id"]


def sweep_folder(default: Path) -> Path:
    """Return the folder for a training without --out: under `wandb agent` each run of a sweep has its own below it."""
    run_id = os.environ.get(SWEEP_RUN_ID)
    return default / run_id if os.environ.get(SWEEP_ID) and run_id else default
