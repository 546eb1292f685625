"""The benchmark of SAEs: plan which texts are read, score the controls once, then each SAE and its random twin.

What is done is on disk, a file for every SAE and problem (a task with its pooling), so that a stopped run goes on where
it was, and a further SAE costs its own encoding alone.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch
from jaxtyping import Float

from sae_italian.analysis.latent import named
from sae_italian.base.errors import UsageError
from sae_italian.base.pace import one_of, paced
from sae_italian.base.statistics import auroc_of_parts
from sae_italian.base.storage import claimed, fingerprint, path_of, read_json, write_json
from sae_italian.base.units import PROCESSORS, map_units
from sae_italian.benchmark import probes
from sae_italian.benchmark.material import Material
from sae_italian.benchmark.probes import Activations, Point, Pooling, model_identity, read_texts
from sae_italian.benchmark.tasks import LEAST, TEST, TRAIN, Plan, ProbingTask, Problem, plan
from sae_italian.corpora.stream import mixture
from sae_italian.saes import check_fits, hooks_of, weights_hash
from sae_italian.saes.baselines import CALIBRATION_TOKENS, random_twin

KIND, SETTINGS = "benchmark", "run_settings.json"
Baselines = Callable[[Any, torch.Tensor], Mapping[str, Any]]  # from an SAE and activations at its hook
EXPLORATORY = 40  # examples in test: fewer say little
QUICK = (300, 200)  # examples of a task in the quick preset, train and test
HEADLINE = (1, 16)  # k's whose influence by document is kept, for comparisons of SAEs


class Bench:
    """Everything that is the same for all SAEs at one hook, whose activations may be a model's or planted ones."""

    def __init__(
        self,
        folder: Path,
        acts: Activations,
        embeddings: Float[np.ndarray, "vocabulary d"],
        planned: Plan,
        n_permuted: int = 20,
    ):
        self.folder, self.embeddings, self.n_permuted = folder, embeddings, n_permuted
        self.texts = planned.texts
        points: dict[Point, None] = {}
        for problem in planned.problems:
            where = problem.points()
            points |= dict.fromkeys(
                where[i] for i in np.concatenate([side for both in problem.draws for side in both]).tolist()
            )
        self.pooling = Pooling(acts, planned.texts, points)
        self.problems: list[Problem] = []  # their draws without words beyond the context
        self.refused = list(planned.refused)
        for problem in planned.problems:
            row = np.array([self.pooling.rows.get(point, -1) for point in problem.points()], dtype=np.int64)
            draws = [(train[row[train] >= 0], test[row[test] >= 0]) for train, test in problem.draws]
            answers = [problem.answer[side] for both in draws for side in both]
            if min(min(y.sum(), (~y).sum()) for y in answers) < LEAST:
                self.refused.append(f"{problem.task.id}: < {LEAST} (n_ctx)")
            else:
                self.problems.append(problem._replace(items=problem.items.assign(row=row), draws=draws))

    def examples(self, problem: Problem, vectors: Any, seed: int = 0) -> probes.Examples:
        """Return a draw of a problem as rows of an array, or a sparse one, that has a row for each point."""
        (train, test), row, y = problem.draws[seed], problem.items.row.to_numpy(), problem.answer
        return probes.Examples(vectors[row[train]], y[train], vectors[row[test]], y[test])

    def controls(self) -> None:
        """Find what form, token identity, activations and embeddings give, for every problem that has no file yet."""
        read = self.pooling.dense, lambda: self.pooling.embedded(self.embeddings)
        self._write("controls", "controls", (each() for each in read), self._control)

    def _control(
        self, problem: Problem, dense: Float[np.ndarray, "points d"], embedded: Float[np.ndarray, "points d"]
    ) -> dict[str, Any]:
        ids, x, e = (self.examples(problem, each) for each in (self.pooling.ids, dense, embedded))
        form, told = (problem.items.form.to_numpy()[side] for side in problem.draws[0])
        given = {"form": ids._replace(x=form, w=told), "tokens": ids, "dense": x, "embedded": e}
        judged = {name: probes.control_probe(name, each) for name, each in given.items()}
        scores = {name: {"auc": j.auc, "accuracy": j.accuracy, "f1": j.f1} for name, j in judged.items()}
        majority = max(problem.frequency, 1 - problem.frequency)
        counts = {"n_train": len(form), "n_test": len(told), "majority": majority}
        return {**scores, **counts, "exploratory": len(told) // 2 < EXPLORATORY}

    def score(self, name: str, folder: str, sae: Any, twin: Any) -> None:
        """Probe an SAE's latents and its random twin's on every problem that has no result in its folder yet."""
        both = (self.pooling.latents(each, f"{name}: latents") for each in (sae, twin))
        self._write(folder, f"{name}: probes", both, self._score)

    def _score(self, problem: Problem, z: scipy.sparse.csr_array, twin: scipy.sparse.csr_array) -> dict[str, Any]:
        ours, theirs, match = [], [], []
        for seed in range(len(problem.draws)):
            own, other = (self.examples(problem, latents, seed) for latents in (z, twin))
            ours.append(probes.sparse_probes(own))
            theirs.append(probes.sparse_probes(other, HEADLINE))
            match.append([probes.matched(each, problem.frequency) for each in (own, other)])

        def by_k(judged: Sequence[dict[int, probes.Judged]], what: str) -> dict[str, list[Any]]:
            return {str(k): [getattr(one[k], what) for one in judged] for k in judged[0]}

        tests = [test for _, test in problem.draws]
        tested, place = np.unique(np.concatenate(tests), return_inverse=True)
        documents, auc, parts = problem.items.document.to_numpy()[tested], by_k(ours, "auc"), by_k(ours, "parts")
        intervals, influence = {}, {}
        for k in map(str, HEADLINE):  # of the mean over the draws, which share examples
            own: Any = pd.Series(np.bincount(place, np.concatenate(parts[k])) / len(tests))
            mean = auroc_of_parts(float(np.mean(auc[k])), own.to_numpy(), problem.answer[tested], documents)
            intervals[k] = mean.finite()[1:]
            influence[k] = own.groupby(documents).sum().round(7).to_dict()
        found = {
            "permuted": probes.permuted(self.examples(problem, z), self.n_permuted, 0),
            "interval": intervals,
            "influence": influence,
            "auc": auc,
            "twin": by_k(theirs, "auc"),
            "match": match,
        }
        means = ((what, by_k(ours, what).items()) for what in ("accuracy", "f1"))
        return found | {what: {k: float(np.mean(values)) for k, values in some} for what, some in means}

    def _write(self, name: str, what: str, vectors: Iterable[Any], judge: Callable[..., dict[str, Any]]) -> None:
        """Write what `judge` finds of each problem that has no file, by processes that share the vectors; without any, none is read."""
        files = {self.folder / name / f"results.{problem.name}.json": problem for problem in self.problems}
        todo = [(file, problem) for file, problem in files.items() if not file.is_file()]
        read = list(vectors) if todo else []

        def one(number: int) -> None:
            file, problem = todo[number]
            write_json(file, judge(problem, *read))

        done = map_units(one, range(len(todo)), workers=PROCESSORS, fork=True)
        for _ in paced(done, what, len(todo), "task"):
            pass


# --- all of it --------------------------------------------------------------------------------------------------------


def check_sae(name: str, sae: Any, model: Any) -> str:
    """Return the SAE's hook. Raises: UsageError for a transcoder, and for an SAE of another model."""
    reads, writes = hooks_of(sae)
    if reads != writes or getattr(sae.cfg, "d_out", sae.cfg.d_in) != sae.cfg.d_in:
        raise UsageError(f"{name} is a transcoder ({reads} to {writes}); the benchmark takes SAEs of one hook.")
    own, there = sae.cfg.metadata.model_name, getattr(model, "loaded_from", {}).get("name")
    if own and there and Path(own).name != Path(there).name:
        raise UsageError(f"{name} was trained on {own!r}, the model here is {there!r}. Give SAEs of one model.")
    return check_fits(sae, model)


def contamination(sae: Any, material: Material) -> list[str]:
    """Return the sources whose corpus the SAE was trained on: their texts are no new ones to it."""
    trained, found = mixture(str(sae.cfg.metadata.dataset_path or "?"))[0], []
    each = [(s, m) for s in material.passages for c in material.corpora.get(s, ()) for m in mixture(c)[0]]
    for (source, corpus), known in product(each, trained):
        one, other = (Path(name).expanduser().resolve() for name in (corpus, known))
        if corpus == known or one.is_relative_to(other) or other.is_relative_to(one):
            found.append(source)
    return list(dict.fromkeys(found))


def benchmark(
    saes: Mapping[str, Any],
    model: Any,
    material: Material,
    tasks: Sequence[ProbingTask],
    out: str | Path,
    *,
    quick: bool = False,
    n_seeds: int = 5,
    baselines: Baselines | None = None,
    **folder: Any,
) -> dict[str, Any]:
    """Score SAEs of one model on tasks; return what was run at which hook, on which SAEs, and what was refused.

    `baselines` makes more SAEs of the first one at each hook and a sample of activations. Results lie in `out`, by hook,
    SAE and problem; `board.py` reads them. `folder`: resume and overwrite as `claimed`.
    Raises: UsageError for SAEs that do not fit, when no task is left, and as `claimed`.
    """
    hooks = {name: check_sae(name, sae, model) for name, sae in named(saes).items()}
    most = QUICK if quick else (TRAIN, TEST)
    planned = plan(material, tasks, most, n_seeds)
    if not planned.problems:
        few = "; ".join(["too few balanced examples a class", *planned.refused[:3]])
        raise UsageError(f"no task can be run: {few if planned.refused else 'none was asked for'}.")
    sources = {name: fingerprint([p.text for p in some]) for name, some in material.passages.items()}
    spec = {**model_identity(model), "tasks": [t.id for t in tasks], "seeds": n_seeds, "most": most, "sources": sources}
    table = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    with claimed(out := path_of(out), KIND, spec, **folder):
        earlier = read_json(out / SETTINGS) if (out / SETTINGS).is_file() else {}
        told: dict[str, Any] = {key: earlier.get(key, {}) for key in ("hooks", "saes")}
        for hook in dict.fromkeys(hooks.values()):
            mine = {name: sae for name, sae in saes.items() if hooks[name] == hook}
            with one_of(len(set(hooks.values()))):
                acts = read_texts(model, hook, planned.texts, out / hook / "activations")
                bench = Bench(out / hook, acts, table, planned)
                facts = _scored(bench, mine, baselines)
            told["hooks"][hook] = _size(bench)
            told["saes"] |= {name: {**one, "hook": hook} for name, one in facts.items()}
        for name, sae in saes.items():
            told["saes"][name]["seen"] = contamination(sae, material)
        told["tasks"] = {t.id: t.model_dump(include={"en", "it", "family", "form"}) for t in tasks}
        told |= {"corpora": material.corpora, "n_copies": material.n_copies, "refused": planned.refused}
        write_json(out / SETTINGS, value := {**spec, **told})
    return value


def _scored(bench: Bench, saes: Mapping[str, Any], baselines: Baselines | None) -> dict[str, dict[str, Any]]:
    """Score SAEs and baselines at one hook; return what each is and where its results lie."""
    bench.controls()
    sample = torch.from_numpy(bench.pooling.sample(CALIBRATION_TOKENS))
    every = dict(saes) | dict(baselines(next(iter(saes.values())), sample) if baselines else {})
    facts = {}
    for left, (name, sae) in zip(range(len(every), 0, -1), every.items(), strict=True):
        facts[name] = _facts(name, sae)
        with one_of(left):
            bench.score(name, facts[name]["folder"], sae, random_twin(sae, 1, lambda: sample))
    return facts


def _facts(name: str, sae: Any) -> dict[str, Any]:
    """Return what an SAE is; its results' folder bears its weights' hash, so that another of its name has its own."""
    metadata, own = sae.cfg.metadata, weights_hash(sae)[:8]
    folder = "saes/" + re.sub(r"[^\w.-]+", "-", name) + f"-{own}"
    config = {key: value for key, value in sae.cfg.to_dict().items() if key != "metadata"}
    known = {"architecture": sae.cfg.architecture(), "d_sae": sae.cfg.d_sae, "model": metadata.model_name}
    return {"folder": folder, **known, "trained_on": metadata.dataset_path, "config": config, "seen": []}


def _size(bench: Bench) -> dict[str, Any]:
    """Return how much was read at a hook, and which problems were run there."""
    tokens, words = sum(map(len, bench.pooling.acts.ids)), sum(len(text.split()) for text in bench.texts)
    size = {"texts": len(bench.texts), "tokens": tokens, "tokens_per_word": tokens / words}
    names = {p.name: {"task": p.task.id, "pooling": p.pooling} for p in bench.problems}
    return size | {"refused": bench.refused, "problems": names}
