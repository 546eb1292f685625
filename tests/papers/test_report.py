"""The papers as data, the report's text, and what is derived from results: without any model."""

import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest
import yaml

from sae_italian.base.errors import UsageError
from sae_italian.base.labels import label
from sae_italian.base.statistics import correlation, slope
from sae_italian.papers import cunningham, llama_scope
from sae_italian.papers.job import PAPERS, paper
from sae_italian.papers.report import NOT_DONE, heading, image_of, lookup, section_of, shown, tables_of, write_report
from sae_italian.papers.reproduce import STEPS


def test_every_paper_has_its_steps_and_each_figure_names_one():
    assert set(PAPERS) == set(STEPS) == {"cunningham-2023", "llama-scope", "clic-it-2025"}
    for name, found in PAPERS.items():
        steps = [*STEPS[name]]
        assert [*found.steps] == steps
        for words in found.steps.values():
            assert set(words) <= {"title", "text", "text_given", "tables", "optional", "trains"}
            assert all(set(words[key]) == {"en", "it"} for key in set(words) - {"tables", "optional", "trains"})
        for figure in found.figures:
            assert figure["ours"].split(".")[0] in steps, (name, figure)
            assert figure["where"] and figure["value"] and all(figure["what"].values()), (name, figure)
        data = resources.files("sae_italian.papers").joinpath("data", f"{name}.yaml").read_text(encoding="utf-8")
        for row in yaml.safe_load(data)["figures"]:  # an unquoted comma would end a text
            assert set(row) - {"percent"} == {"what", "where", "value", "ours"} and set(row["what"]) == {"en", "it"}, (
                row
            )


def test_a_budget_takes_overrides_of_the_right_kind_only():
    chosen = paper("cunningham-2023")
    budget = chosen.with_budget("latents=7", "layers=[1]", "kinds=[pca]")
    assert budget["latents"] == 7 and budget["layers"] == [1] and budget["kinds"] == ["pca"]
    assert chosen.budget["latents"] != 7
    for wrong, message in (
        ("latent=7", "'latent=7' is no setting here.* Did you mean 'latents'"),
        ("latents=0", "latents is 0; it should be greater than or equal to 1"),
        ("latents=many", "latents is 'many'; it should be a valid integer"),
        ("kinds=pca", "kinds is 'pca'; it should be a valid list"),
        ("latents=[3]", r"latents is \[3\]; it should be a valid integer"),
        ("l1=[a]", "l1 is 'a'; it should be a valid"),
    ):
        with pytest.raises(UsageError, match=message):
            chosen.with_budget(wrong)
    with pytest.raises(UsageError, match="'llama-scop' is unknown. Did you mean 'llama-scope'"):
        paper("llama-scop")


def test_lookup_goes_through_dicts_lists_and_stars():
    results = {"a": {"rows": [{"x": 1}, {"x": 2}, {}]}, "b": None}
    assert lookup(results, "a.rows.1.x") == 2
    assert lookup(results, "a.rows.*.x") == [1, 2, None]
    assert lookup(results, "a.rows.7.x") is None and lookup(results, "b.c") is None and lookup(results, "z") is None


def test_ours_stand_beside_the_papers_and_a_dash_where_there_is_none():
    card = {"l0": {"value": 8.0, "lo": 7.5, "hi": 8.5}, "dead": {"value": 0.25, "lo": None, "hi": None}}
    results = {"card": card, "sae": {"layer": 2}}
    rows = {row["what"]: row for row in paper("clic-it-2025").beside(results)}
    assert rows["Latents per token (K)"]["ours"] == "8.000 (7.500 to 8.500)"
    assert rows["Latents that are dead or almost never active"]["ours"] == "25.0 %"
    assert rows["Layer"]["ours"] == "2" and rows["Detection"]["ours"] == "-"
    assert rows["Latents with an explanation"]["paper"] == "53,540 of 65,536 (81.7 %)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (12345, "12,345"),
        (0.12345, "0.123"),
        (25_000.4, "25,000"),
        ("8x", "8x"),
        ({"value": 0.5, "lo": 0.4, "hi": 0.6}, "0.500 (0.400 to 0.600)"),
        ({"value": 0.5, "lo": None, "hi": None}, "0.500"),
        ({"value": None, "lo": None, "hi": None}, "-"),
    ],
)
def test_cells(value, text):
    assert shown(value) == text


def test_percent():
    assert shown(-1e-9, percent=True) == "0.0 %"
    assert shown({"value": 0.5, "lo": 0.4, "hi": 0.6}, percent=True) == "50.0 % (40.0 % to 60.0 %)"


class _Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def written(tmp_path):
    rows = [{"a": "x|y", "b": "<script>alert(1)</script> [c](http://d) ![e](f)"}, {"a": "è", "b": "2"}]
    table = {"caption": "uno", "rows": "rows", "columns": {"a": "a", "b": "b"}}
    head = {"title": {"en": "Title", "it": "Titolo"}, "text": {"en": "Intro", "it": "Inizio"}}
    one = {"title": {"en": "One", "it": "Uno"}, "text": {"en": "Text & more.", "it": "Testo."}, "tables": [table]}
    parts = section_of(head, {}, head=True) + section_of(one, {"rows": rows}) + [(image_of("p"), "en")]
    parts += [*heading({"en": "Two", "it": "Due"}), (f"{NOT_DONE}: the model cannot", "en")]
    write_report(tmp_path, parts, {"p": "<?xml?><svg><path/></svg>"})
    return tmp_path


def test_the_page_is_whole_escaped_and_asks_for_nothing(written):
    page = (written / "report.html").read_text()
    parser = _Balance()
    parser.feed(page)
    assert not parser.open and parser.seen.count("table") == 1 and parser.seen.count("svg") == 1
    assert "<script>" not in page and "&lt;script&gt;" in page and "Text &amp; more." in page
    assert "<td>x|y</td>" in page and '<div lang="it"><p>Inizio</p>' in page
    assert not re.search(r"(src|href)=", page) and "url(" not in page
    assert "Not done · Non svolto: the model cannot" in page


def test_the_markdown_is_a_table_whatever_a_cell_holds(written):
    text = (written / "report.md").read_text()
    assert "**uno**\n\n| a | b |\n|---|---|\n| x\\|y | <script>alert(1)</script>" in text and "| è | 2 |" in text
    assert "![p](pictures/p.svg)" in text and (written / "pictures" / "p.svg").is_file()
    (again,) = tables_of({"markdown": "lines"}, {"lines": ["| a |", "|---|", "| 1 |"]})
    assert again == "| a |\n|---|\n| 1 |"


def test_tables_are_read_off_their_descriptions():
    result = {
        "layers": [{"n": 1, "rows": [{"a": 0.5, "b": {"c": 2}, "t": "x" * 300}]}],
        "one": {"s": 0.25},
        "two": None,
    }
    columns = {"A": "a|%", "B": "b.c|.1f", "T": "t|short", "none": "z"}
    (table,) = tables_of({"each": "layers", "caption": "layer {n}", "rows": "rows", "columns": columns}, result)
    assert table == "**layer 1**\n\n| A | B | T | none |\n|---|---|---|---|\n| 50.0 % | 2.0 | ... | - |"
    (table,) = tables_of({"of": {"x": "one", "y": "two"}, "facts": {"share": "s|2", "card.l0": "t"}}, result)
    assert table == f"|  | x |\n|---|---|\n| share | 0.25 |\n| {label('card.l0')} | - |"
    (table,) = tables_of({"rows": "", "columns": {"S": "one.s"}}, result)
    assert table.endswith("| 0.250 |")


def estimate(value):
    return {"value": value, "lo": value, "hi": value}


def layer(number, **scores):
    rows = [
        {
            "dictionary": name.replace("_", "-"),
            "simulation": estimate(score),
            "perplexity_of_model": estimate(2.0),
            "perplexity": estimate(3.0),
        }
        for name, score in scores.items()
    ]
    return {"layer": number, "rows": rows}


def test_what_the_baselines_say_is_read_off_their_scores():
    first = layer(0, sae=0.6, pca=0.2, pca_topk=0.3, ica=0.1, ica_topk=0.2, random=0.3, identity=0.25)
    second = layer(3, sae=0.5, pca=0.3, pca_topk=0.4, ica=0.4, ica_topk=0.45, random=0.1, identity=0.1)
    said = cunningham.derived([first, second])
    assert said["best_relu"] == "layer 0: random directions 0.300, SAE 0.600; layer 3: ICA 0.400, SAE 0.500"
    assert said["gap_closed"] == f"PCA {100 * (0.25 + 0.5) / 2:.0f} %, ICA {100 * (0.2 + 0.5) / 2:.0f} %"
    assert said["neurons_minus_random"] == pytest.approx(-0.025)
    assert said["perplexity_factor"].startswith("layer 0: 2.00 to 3.00, a factor 1.50; layer 3")


def test_what_sites_and_widths_say_is_read_off_their_cards():
    def row(site, expansion, variance, dead):
        return {
            "name": f"L1{site}-{expansion}x",
            "site": site,
            "expansion": expansion,
            "l0": estimate(8.0),
            "explained_variance_uncentred": estimate(variance),
            "delta_lm_loss": estimate(0.1),
            "dead": estimate(dead),
            "ultra_active": estimate(0.01),
        }

    rows = [row("A", 8, 0.7, 0.1), row("A", 32, 0.75, 0.3), row("R", 8, 0.9, 0.05), row("R", 32, 0.93, 0.2)]
    said = llama_scope.derived(rows, 1000)
    assert said["best_site"] == "R 0.900, A 0.700" and said["width_gain"] == "R +0.030; A +0.050"
    assert said["reference"].startswith("L1R-8x: 0.900") and said["dead"] == "5.0 to 30.0 % in 1,000 tokens"
    assert llama_scope.derived(rows[2:3], 1000)["width_gain"] is None
    higher = [row("R", 8, 0.7, 0.05), row("R", 32, 0.75, 0.2), row("A", 8, 0.8, 0.1), row("A", 32, 0.82, 0.3)]
    said = llama_scope.derived(rows + higher, 1000)  # of two layers: means over them, not the last one's
    assert said["best_site"] == "R 0.800, A 0.750" and said["width_gain"] == "R +0.040; A +0.035"


def test_correlation_is_pearsons_and_leaves_out_what_is_not_there():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = x + rng.normal(size=200)
    found = correlation(np.append(x, np.nan), np.append(y, 3.0))
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9) and found.lo < found.value < found.hi
    assert np.isnan(correlation(x[:2], y[:2]).value)
    same = np.full(9, 0.3)  # nothing to go by, however its squares are rounded
    assert np.isnan(correlation(same, x[:9]).value) and np.isnan(slope(same, x[:9]).value)
    steep = slope(x, 3 * y)
    assert steep.value == pytest.approx(np.polyfit(x, 3 * y, 1)[0], abs=1e-9) and steep.lo < 3 < steep.hi
