"""Recorded curves: every recipe of the mini model has one and still trains along it; what is off in a run is said."""

import json
import re

import matplotlib.figure
import numpy as np
import pytest

from sae_italian.cli import main
from sae_italian.training import curves, load_spec, train
from sae_italian.training.curves import TITLES, Curve, look_at_training, read_curve, recorded_curves
from tests.bench.record_curves import mini_recipes, outside, plain, record, shortened

RECORDED, SHORT = (
    {recipe: (spec, curve) for recipe, spec, curve in recorded_curves(size)} for size in ("full", "short")
)


def test_every_recipe_has_its_curve():
    """A recipe without a recorded curve fails here: `python -m tests.bench.record_curves mini/NAME` makes one."""
    assert "mini/topk" in mini_recipes() and set(RECORDED) == set(mini_recipes())
    for recipe, (spec, _) in RECORDED.items():
        assert curves.same_recipe(spec, load_spec(recipe).model_dump(mode="json")), f"{recipe} has changed"


@pytest.mark.parametrize("recipe", mini_recipes())
def test_a_shortened_recipe_trains_along_its_curve(recipe, tmp_path):
    curve = read_curve(train(shortened(load_spec(recipe)), tmp_path / "sae"))
    _, short = SHORT[recipe]
    assert curve["share"] == pytest.approx(short["share"]) and len(curve["share"]) == 4
    assert outside(curve, short) == []


def findings(folder) -> dict[str, str]:
    """Return what is off in a training, by the check's name."""
    checks, _ = look_at_training(folder)
    return {check.name: f"{check.found}: {check.remedy}" for check in checks if check.status != "pass"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECORDED)
def test_a_recipe_trains_along_its_curve(recipe, tmp_path):
    folder = train(load_spec(recipe), tmp_path / "sae")
    assert not findings(folder) and outside(read_curve(folder), RECORDED[recipe][1]) == []
    assert look_at_training(folder)[0][0].found == f"finished; beside a healthy run of {recipe}"


@pytest.mark.parametrize("recipe", RECORDED)
def test_the_recorded_run_itself_is_healthy(recipe, tmp_path):
    spec, curve = RECORDED[recipe]
    folder = written(tmp_path, curve, spec)
    assert not findings(folder) and recipe in look_at_training(folder)[0][0].found
    assert curve["explained_variance"][-1] > 0.5 and curve["share"][-1] > 0.95


def written(folder, curve: Curve, spec: dict, **changes):
    """A training's folder with these curves; `changes` replace metrics by functions of the recorded one."""
    values = {name: changes.get(name, lambda x: x)(curve[name]) for name in TITLES}
    rows = [
        {
            "step": 10 * i,
            "details/n_training_samples": share * spec["training_tokens"],
            "losses/overall_loss": values["loss"][i],
            "metrics/l0": values["l0"][i],
            "metrics/explained_variance": values["explained_variance"][i],
            "sparsity/dead_features": values["dead"][i] * spec["sae"]["d_sae"],
        }
        for i, share in enumerate(curve["share"].tolist())
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9')
    (folder / "run.json").write_text(json.dumps({"kind": "train", "created": "", "spec": spec}))
    return folder


@pytest.fixture
def healthy(monkeypatch, small_spec):
    """A recipe with a curve as one would draw it: loss falls, explained variance rises to 0.9, a few latents die."""
    share = np.linspace(0.02, 1, 50)
    values = {"loss": 100 * np.exp(-3 * share), "l0": 8 + 0 * share, "dead": 0.05 * share}
    curve, spec = {"share": share, **values, "explained_variance": 0.9 * (1 - np.exp(-5 * share))}, {}
    monkeypatch.setattr(curves, "recorded_curves", lambda: iter([("r/own", spec, curve)]))
    spec |= small_spec.model_dump(mode="json")
    return curve, spec


def ramp(x):
    return np.linspace(0, 1, len(x))


SICK = {
    "dead": (lambda x: x + 0.5 * ramp(x), "training: dead latents", ".* % and rising where 4.8 % is healthy: lower lr"),
    "l0": (lambda x: x * 0.7, "training: l0", "5.6, k = 8: look at"),
    "explained_variance": (
        lambda x: x - 0.2,
        "training: explained variance",
        "0.69. where 0.89. is healthy: look at lr",
    ),
    "loss": (lambda x: x * (1 + 40 * ramp(x) ** 4), "training: loss", "it is diverging: .* lower lr .now 0.006"),
}


@pytest.mark.parametrize("metric", SICK)
def test_what_is_off_is_said(metric, healthy, tmp_path):
    change, name, words = SICK[metric]
    curve, spec = healthy
    folder = written(tmp_path / "run", curve, spec, **{metric: change})
    found = findings(folder)
    assert list(found) == [name] and re.match(words, found[name]), found
    assert outside(read_curve(folder), curve)


def test_a_band_of_dead_latents_stays_a_share():
    low, high = curves.band("dead", np.array([0.0, 0.99]))
    assert low[0] == 0 and high[1] == 1 and (low <= high).all()
    assert curves.band("l0", np.array([0.0]))[0] <= 0 < curves.band("l0", np.array([8.0]))[0]


def test_the_grey_band_is_what_is_tolerated_and_the_legend_says_so(healthy, tmp_path, monkeypatch):
    """Each metric's area runs along its tolerance around the healthy curve, under the run's own line."""
    drawn = {}
    monkeypatch.setattr(curves, "svg", lambda draw, n, size: drawn.update(draw=draw, n=n) or "")
    curve, spec = healthy
    look_at_training(written(tmp_path / "run", curve, spec, l0=lambda x: x + 0.1))
    axes = matplotlib.figure.Figure().subplots(1, drawn["n"])
    drawn["draw"](axes)
    for axis, name in zip(axes, TITLES, strict=True):
        ((corners,), (line,)) = (axis.collections[0].get_paths(), axis.lines)
        relative, absolute = curves.TOLERANCE[name]
        at, room = corners.vertices[:, 1], relative * curve[name] + absolute
        low, high = curve[name] - room, curve[name] + room
        assert at.min() == pytest.approx(max(low.min(), 0) if name == "dead" else low.min())
        assert at.max() == pytest.approx(high.max())
        assert line.get_ydata() == pytest.approx(curve[name] + (0.1 if name == "l0" else 0))
    words = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert words[0].startswith("tolerated around a healthy run") and words == [*words[:1], "run"]


@pytest.mark.parametrize("warm", [{"k_anneal_share": 0.6}, {"sae": {"d_sae": 256, "l1_warm_up_steps": 24}}])
def test_a_loss_that_grows_by_plan_is_not_diverging(healthy, tmp_path, warm):
    """While k falls, or an L1 coefficient grows, fewer latents fire with every step; after that it may not grow."""
    curve, spec = healthy
    planned = {**spec, **warm}
    by_plan = written(tmp_path / "plan", curve, planned, loss=lambda x: 20 + 60 * np.minimum(curve["share"] / 0.6, 1))
    assert "training: loss" not in findings(by_plan)
    assert "training: loss" in findings(written(tmp_path / "fixed", curve, spec, loss=lambda x: 20 + 60 * ramp(x)))
    late = written(tmp_path / "late", curve, planned, loss=lambda x: np.where(curve["share"] < 0.8, 20.0, 200.0))
    assert "diverging" in findings(late)["training: loss"]


def test_settings_that_leave_the_curve_as_it_is_are_held_against_it(healthy, tmp_path):
    curve, spec = healthy
    run = written(tmp_path / "run", curve, {**spec, "seeds": 3, "evaluate_every_tokens": 5000, "repeat_corpus": True})
    assert "beside a healthy run of r/own" in look_at_training(run)[0][0].found


def test_a_loss_that_is_not_finite(healthy, tmp_path):
    folder = written(tmp_path / "run", *healthy, loss=lambda x: np.append(x[:-1], np.nan))
    assert "not finite" in findings(folder)["training: loss"]


def test_an_l1_saes_l0_is_held_against_the_curve(healthy, tmp_path):
    curve, spec = healthy
    spec["sae"] = {"architecture": "standard", "d_sae": 256, "l1_coefficient": 1.0}
    run = written(tmp_path / "run", curve, spec, l0=lambda x: 5 * x)
    assert findings(run) == {"training: l0": "40 where 8 is healthy: raise sae.l1_coefficient"}


def test_a_run_half_done_is_held_against_half_the_curve(healthy, tmp_path):
    curve, spec = healthy
    half = {name: values[:25] for name, values in curve.items()}
    run = written(tmp_path / "run", half, spec)
    assert not findings(run) and look_at_training(run)[0][0].found == "50 % done; beside a healthy run of r/own"


def test_another_recipe_is_not_held_against_the_curve(healthy, tmp_path):
    """What needs no other run is still judged: divergence, and L0 against k."""
    curve, spec = healthy
    other = {**spec, "model": "minerva-350m"}
    run = written(tmp_path / "run", curve, other, dead=lambda x: x + 0.5, explained_variance=lambda x: x - 0.5)
    checks, svg = look_at_training(run)
    assert not findings(run) and "no curve of this recipe is recorded" in checks[0].found and "sano" not in svg
    assert "training: l0" in findings(written(tmp_path / "l0", curve, other, l0=lambda x: x * 2))


def test_the_doctor_draws_and_says_while_the_training_goes_on(healthy, tmp_path, capsys):
    run = written(tmp_path / "run", *healthy)
    assert main(["saes", "doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "pass  training: explained variance" in out and f"curves: {run / 'curves.svg'}" in out
    svg = (run / "curves.svg").read_text()
    assert "<svg" in svg and "varianza spiegata" in svg and "healthy run · tollerato attorno a una prova sana" in svg
    picture = tmp_path / "x.svg"
    assert main(["saes", "doctor", str(run), "--out", str(picture), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["status"] == "pass" and value["picture"] == str(picture)
    assert picture.read_text() == svg  # the same numbers, the same bytes


def test_the_old_command_says_the_new_one(capsys):
    assert main(["curves", "runs/topk"]) == 2
    assert "`curves` is now `saes doctor RUN`" in capsys.readouterr().err


def test_recording_writes_what_is_read(tmp_path, small_spec, monkeypatch):
    import yaml

    (tmp_path / "r").mkdir()
    recipe = tmp_path / "r" / "own.yaml"
    recipe.write_text(yaml.safe_dump(small_spec.model_dump(mode="json", exclude_none=True)))
    file = record(str(recipe))
    assert file == tmp_path / "r" / "curves" / "own.json"
    monkeypatch.setattr(curves, "configs_folder", lambda: tmp_path)
    first = [plain(curve) for size in ("short", "full") for name, _, curve in recorded_curves(size) if name == "r/own"]
    assert len(first) == 2 and record(str(recipe), full=False) == file
    assert [plain(curve) for size in ("short", "full") for _, _, curve in recorded_curves(size)] == first  # by the seed
