"""The notebook's side: messages and their answers, plain HTML where the widget is not, and what is refused."""

import re
import shutil

import pytest

from sae_italian.base.errors import UsageError
from sae_italian.browser import widget
from sae_italian.browser.opening import PageAnswers, beside
from sae_italian.browser.widget import Plain, card_html, show
from sae_italian.cache import FeatureCache
from sae_italian.saes import load_sae
from tests.browser.nasty import CONTROL, LONG_WORD, RTL, SCRIPT
from tests.browser.schema import check, check_card


@pytest.fixture(scope="module")
def folder(small_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("widget") / "cache"
    return shutil.copytree(small_cache, folder, ignore=shutil.ignore_patterns("*.sqlite*"))


@pytest.fixture(scope="module")
def shown(folder, mini, trained_sae):
    pytest.importorskip("anywidget", reason="needs the notebook extra")
    return show(folder, 3, sae=load_sae(trained_sae), model=mini)


def ask(shown, name, argument=None):
    sent = []
    shown.send = sent.append
    shown._asked(shown, {"id": 7, "name": name, "argument": argument}, [])
    (reply,) = sent
    assert reply["id"] == 7
    return reply


def test_messages_are_answered_with_records_and_live_work(shown):
    assert shown.latent == 3 and "latent=LATENT" in shown.permalink
    about = ask(shown, "run")["value"]
    assert about["run"]["d_sae"] == 256 and about["live"] and not about["live"]["llm"] and about["compare"] is None
    assert len(ask(shown, "rows")["value"]["latent"]) == 256
    check_card(ask(shown, "card", 3)["value"])
    assert ask(shown, "tokens", {"sentence": "La ragazza \ud800 legge"})["value"]["strongest"]


def test_another_sae_stands_beside_it_by_messages(shown, folder):
    source = shown.answers.source
    other = beside(source, source)
    pair = widget.widget_class()(PageAnswers(source, shown.answers.live, other), 3)
    assert ask(pair, "run")["value"]["compare"] == other.name
    assert ask(pair, "matches")["value"]["latent"] == list(range(256))
    assert ask(pair, "other/run")["value"]["run"]["d_sae"] == 256
    check_card(ask(pair, "other/card", 5)["value"])
    check("[group]", ask(pair, "wide", 5)["value"])
    assert "No live work" in ask(pair, "other/tokens", {"sentence": "a"})["error"]
    assert ask(shown, "matches")["error"] and ask(shown, "other/card", 5)["error"]


@pytest.mark.parametrize(
    "name, argument", [("card", 256), ("card", "3"), ("card", None), ("open", "/etc/passwd"), (5, 5), ("steer", {})]
)
def test_messages_that_make_no_sense_get_one_line(shown, name, argument):
    assert "\n" not in ask(shown, name, argument)["error"]
    shown._asked(shown, "no message", [])
    shown._asked(shown, {"name": "run"}, [])


def test_a_notebook_that_is_only_read_has_the_card_as_html(shown):
    data, _ = shown._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data and "<h3>Latente 3</h3>" in data["text/html"]


def test_the_module_is_one_file_without_imports(shown):
    esm = widget.widget_class()._esm
    assert esm.count("\nexport ") == 1 and "export default { render };" in esm  # anywidget warns of any other
    assert not re.search(r"^import |\bimport\(|https?://(?!www\.w3\.org)", esm, re.MULTILINE)


def test_without_anywidget_there_is_html(folder, monkeypatch):
    monkeypatch.setattr(widget, "find_spec", lambda _: None)
    found = show(folder)
    assert isinstance(found, Plain)
    html = found._repr_html_()
    assert html.count("<tr>") == 51 and "<script" not in html
    assert "<mark" in show(folder, int(FeatureCache.open(folder).statistics["count"].argmax()))._repr_html_()


def test_a_cache_or_a_latent_that_is_not_there(folder, tmp_path):
    with pytest.raises(UsageError, match="latents 0 to 255"):
        show(folder, 256)
    with pytest.raises(UsageError, match="not a feature cache"):
        show(tmp_path)


def test_without_live_work_a_message_says_why(shown):
    with pytest.raises(UsageError, match="No live work"):
        PageAnswers(shown.answers.source)("tokens", {"sentence": "a"})


def test_a_cache_is_shown_by_itself_and_another_sae_beside_it_is_refused(folder, mini, trained_sae, topk_sae):
    pytest.importorskip("anywidget", reason="needs the notebook extra")
    assert show(FeatureCache.open(folder), 3, live=False).latent == 3
    for plain in (False, True):
        with pytest.raises(UsageError, match="built with another SAE"):
            show(folder, 3, sae=topk_sae, model=mini, plain=plain)
    with pytest.raises(TypeError, match="saes"):  # a name that is not there was taken for weights, and left
        show(folder, 3, saes=load_sae(trained_sae))


def test_plain_html_is_harmless(shown):
    row, card = dict(shown.answers.source.row(3)), dict(shown.answers.source.card(3))
    row |= {"explanation_it": SCRIPT + RTL + CONTROL, "explanation_en": LONG_WORD, "max": 1.0}
    context = {"doc_id": SCRIPT, "source": SCRIPT, "max": 1.0}
    context["segments"] = [(SCRIPT, 1.0), (RTL, 0.5), (CONTROL, 0.0), (LONG_WORD, 0.2), ("\ud800", 1.0)]
    group = {"name_it": "", "name_en": "", "lo": None, "hi": None, "contexts": [context]}
    html = card_html(row, card | {"groups": [group], "promoted": [{"token": SCRIPT, "value": 1.0}]})
    assert "<script" not in html and "<img" not in html and html.count("&lt;script&gt;") == 3
    assert not re.search(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]", html) and "␀" in html
    assert LONG_WORD not in html and html.count("<bdi") == html.count("</bdi>")
