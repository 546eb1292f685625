"""Publish an SAE: weights and config by SAELens' own upload call, with the evaluation card, the curves and a model card.

Also a static page as a Space of the hub, and a training's report at W&B."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple

from sae_italian.base.errors import UsageError
from sae_italian.base.hub import TOKENS_PAGE, WANDB_FILE, WandbRun, explain
from sae_italian.base.labels import label
from sae_italian.base.storage import read_json, record_in, understood
from sae_italian.corpora.stream import mixture
from sae_italian.evaluation.card import DENSITY_PICTURE, EvaluationCard, read_card
from sae_italian.models import catalogue
from sae_italian.training.curves import look_at_training
from sae_italian.training.logging import METRICS_FILE, OUR_FILES, SAE_FILES, SAELENS_FILES

MODEL_CARD = "README.md"
# What a report at W&B shows: curves of the training, pictures and pages, tables; those of an export join the run's group.
CURVES = ("losses/overall_loss", "metrics/explained_variance", "metrics/l0", "sparsity/dead_features")
PAGES, TABLES = ("eval/density", "strongest"), ("eval/card", "eval/latents", "latents")
# What the front matter states as results, for the hub's tables.
RESULTS = ("l0", "explained_variance", "explained_variance_uncentred", "ce_loss_recovered", "delta_lm_loss", "dead")


class Upload(NamedTuple):
    """What is, or would be, uploaded: path in the repository and size in bytes."""

    repo_id: str
    sae_id: str
    private: bool
    files: dict[str, int]
    warnings: tuple[str, ...]
    done: bool

    def text(self) -> str:
        head = f"{'uploaded to' if self.done else 'dry run, nothing sent: would go to'} {self.repo_id}"
        lines = [f"{size:>14,}  {path}" for path, size in self.files.items()]
        total = f"{sum(self.files.values()):>14,}  bytes in {len(self.files)} files"
        notes = [f"note: {warning}" for warning in self.warnings]
        return "\n".join([head + (" (private)" if self.private else ""), *lines, total, *notes])


def publish(
    folder: Path,
    repo_id: str,
    *,
    sae_id: str | None = None,
    licence: str | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Upload the SAE in `folder` to the hub repository `repo_id`, below `sae_id` (default: the folder's name).

    A new repository is made, private if asked. Its README.md becomes the SAE's model card; one that is there already is
    left as it is, and every SAE has its own beside its weights. `licence` is the hub's word for that of the weights
    (default: the model's, where the catalogue knows it). With `dry_run` nothing is sent.
    Raises: UsageError for a folder without SAELens' files or without an evaluation card, for a repository that is not
    `owner/name`, without a token, and for what the hub refuses.
    """
    sae_id = sae_id or folder.resolve().name
    if missing := [name for name in SAE_FILES if not (folder / name).is_file()]:
        raise UsageError(f"{folder} holds no {' and no '.join(missing)}: give the folder of a finished training.")
    check_repository(repo_id)
    if (card := read_card(folder)) is None:
        raise UsageError(
            f"{folder} has no evaluation card, and nothing is published without one. "
            f"Make it: sae-italian evaluate {folder} --tokens 1000000 --loss-tokens 100000"
        )
    text = model_card(folder, card, repo_id, sae_id, licence)
    ours: dict[str, Any] = {name: folder / name for name in OUR_FILES if (folder / name).is_file()}
    if METRICS_FILE in ours:
        ours["curves.svg"] = look_at_training(folder)[1].encode()
    ours = {f"{sae_id}/{name}": content for name, content in (ours | {MODEL_CARD: text.encode()}).items()}
    ours[MODEL_CARD] = text.replace(DENSITY_PICTURE, f"{sae_id}/{DENSITY_PICTURE}").encode()
    if not dry_run:
        _send(folder, ours, repo_id, sae_id, private)
    theirs = {f"{sae_id}/{name}": folder / name for name in SAELENS_FILES if (folder / name).is_file()}
    files = {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size
        for path, content in (theirs | ours).items()
    }
    # what others would stumble over: local paths where names that everyone has are expected
    metadata = read_json(folder / "cfg.json").get("metadata") or {}
    warnings = tuple(
        f"cfg.json's metadata.{key} is the local path {metadata[key]}; others cannot find it there"
        for key in ("model_name", "dataset_path")
        if any(Path(name).is_absolute() for name in mixture(str(metadata.get(key)))[0])
    )
    return Upload(repo_id, sae_id, private, files, warnings, not dry_run)


def check_repository(repo_id: str) -> None:
    """Raises: UsageError for what is not the name of a repository, owner/name."""
    if repo_id.count("/") != 1 or repo_id.strip("/.~") != repo_id or repo_id.split() != [repo_id]:
        raise UsageError(f"repository {repo_id!r} is not of the form owner/name, e.g. unipi/minerva-1b-saes.")


def _send(folder: Path, ours: dict[str, Any], repo_id: str, sae_id: str, private: bool) -> None:
    """Upload SAELens' files of the SAE and `ours`, from which a README.md that the repository has is taken out.

    Raises: UsageError.
    """
    from huggingface_hub import CommitOperationAdd
    from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

    with _writing(repo_id) as api:
        api.create_repo(repo_id, private=private, exist_ok=True)  # SAELens' call would make it public
        upload_saes_to_huggingface({sae_id: folder}, repo_id, show_progress=False, add_default_readme=False)
        if api.file_exists(repo_id, MODEL_CARD):
            del ours[MODEL_CARD]
        added = [CommitOperationAdd(path, content) for path, content in ours.items()]
        api.create_commit(repo_id, added, commit_message=f"Evaluation card and curves of {sae_id}")


def send_space(folder: Path, repo_id: str) -> str:
    """Upload the folder of a static page as the Space `repo_id`, in the place of what was there; return its address.

    Raises: UsageError without a token, and for what the hub refuses.
    """
    with _writing(repo_id) as api:
        api.create_repo(repo_id, repo_type="space", space_sdk="static", exist_ok=True)
        where = {"repo_id": repo_id, "repo_type": "space", "delete_patterns": ["data/*", "other/*"]}  # a larger one's
        api.upload_folder(folder_path=folder, commit_message="Latent browser", **where)
        return f"{api.endpoint}/spaces/{repo_id}"


def report_to_wandb(folder: Path) -> str:
    """Make a report of a training at W&B: its card, its curves, its latents and the exports of its group; return its address.

    Raises: UsageError for a training that did not tell W&B, without the packages or a login, and for what W&B refuses.
    """
    run, card = WandbRun.of(folder), read_card(folder)
    if run.id is None:
        raise UsageError(
            f"{folder} holds no W&B run ({WANDB_FILE}): train with wandb=online, or wandb=offline and sync."
        )
    try:
        import wandb

        reports = import_module("wandb_workspaces.reports.v2")
    except ImportError:
        raise UsageError("a report needs W&B's packages: pip install 'sae-italian[sweeps]'.") from None
    if not wandb.login(prompt=False, verify=False):
        raise UsageError("nobody is logged in at W&B: run `wandb login`, or set WANDB_API_KEY.")
    entity, _, project = run.project.rpartition("/")
    try:
        entity = entity or wandb.Api().default_entity
        runs: Any = [reports.Runset(entity, project, name=folder.resolve().name, filters=f"Group = '{run.id}'")]
        shown = {
            "Training": [reports.LinePlot(x="Step", y=[key]) for key in CURVES],
            "Latents": [
                *(reports.MediaBrowser(media_keys=[key]) for key in PAGES),
                *(reports.WeavePanelSummaryTable(table_name=key) for key in TABLES),
            ],
        }
        blocks: Any = [reports.MarkdownBlock(card.markdown())] if card else []
        for name, panels in shown.items():
            blocks += [reports.H2(name), reports.PanelGrid(runsets=runs, panels=panels)]
        title = f"SAE {folder.resolve().name}"
        return reports.Report(project, entity, title=title, blocks=blocks, width="fluid").save().url
    except Exception as error:  # of W&B's many kinds; each becomes one line
        why = " ".join(str(error).split())[:300]
        raise UsageError(f"W&B made no report in {run.project}: {why}. Is the run there? (wandb sync)") from error


@contextmanager
def _writing(repo_id: str) -> Iterator[Any]:
    """Yield the hub's API to write to a repository. Raises: UsageError without a token, and for what the hub refuses."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UsageError(
            "the hub needs to know who you are: run `hf auth login`, or set HF_TOKEN to a token that may write "
            f"({TOKENS_PAGE})."
        )
    try:
        yield HfApi()
    except Exception as error:  # the hub's errors are of many kinds; each becomes one line
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UsageError(
                f"the hub does not let this token write to {repo_id} ({status}): run `hf auth login` with a token that "
                f"has write access to it ({TOKENS_PAGE})."
            ) from error
        raise explain(error, repo_id) from error


def model_card(folder: Path, card: EvaluationCard, repo_id: str, sae_id: str, licence: str | None = None) -> str:
    """Return the README.md of the SAE in `folder`, Markdown in Italian and English with the hub's YAML front matter."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    spec = record_in(folder).get("spec", {})
    with understood(folder / "cfg.json"):
        architecture = read_json(folder / "cfg.json").get("architecture", "sae")
    entry = catalogue().get(card.model)
    word = entry.licence.lower() if entry else "other"
    words: dict[str, Any] = {
        "card": card,
        "repo_id": repo_id,
        "sae_id": sae_id,
        "architecture": architecture,
        "spec": spec,
        "corpus": ", ".join(Path(name).name for name in mixture(str(spec.get("corpus")))[0]),
        "target": card.hook_name_out if card.hook_name_out != card.hook_name else "",
        "picture": DENSITY_PICTURE if (folder / DENSITY_PICTURE).is_file() else "",
        "en": "{:,}".format,
        "it": lambda number: f"{number:,}".replace(",", "."),
    }
    where: Any = {
        "task_type": "feature-extraction",
        "task_name": "sparse reconstruction of activations",
        "dataset_type": card.corpus if _on_hub(card.corpus) else "local",
        "dataset_name": ", ".join(Path(name).name for name in mixture(card.corpus)[0]),
        "dataset_split": card.split,
    }
    values = {key: estimate.value for key, estimate in card.estimates().items() if key in RESULTS}
    front = ModelCardData(
        library_name="saelens",
        license=licence or ("other" if " " in word else word),  # the hub refuses words not its own
        language=["it"],
        tags=["sparse-autoencoder", "sae", "saelens", "sae-italian", "mechanistic-interpretability", architecture],
        metrics=list(RESULTS),
        base_model=card.model if _on_hub(card.model) else None,
        datasets=[card.corpus] if _on_hub(card.corpus) and "," not in card.corpus else None,
        model_name=sae_id,
        widget=[{"text": f"{sae_id}: density", "output": {"url": DENSITY_PICTURE}}] if words["picture"] else None,
        eval_results=[
            EvalResult(metric_type=key, metric_name=label(f"card.{key}"), metric_value=value, **where)
            for key, value in values.items()
            if value == value
        ],
    )
    template = resources.files("sae_italian.training").joinpath("model_card.md").read_text(encoding="utf-8")
    return ModelCard.from_template(front, template_str=template, **words).content


def _on_hub(name: str) -> bool:
    """Return whether a name has the form of a hub id, owner/name, and is no path."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~", "hf:")) and not Path(name).exists()
