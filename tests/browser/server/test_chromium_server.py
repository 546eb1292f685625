"""The served page and the widget in a real browser: live work, nasty texts, nothing asked of anybody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from sae_italian.browser.opening import N_NEAR, PageAnswers, nearest_in_meaning
from sae_italian.browser.page import style
from sae_italian.cache import FeatureCache
from tests.browser.chromium import NEEDS_CHROMIUM, until
from tests.browser.letters import letters
from tests.browser.nasty import CONTROL, LONG_WORD, RTL, SCRIPT
from tests.browser.test_chromium import LOW_CONTRAST, MARKS, NAMELESS

from .conftest import create_app, open_with_live
from .running import browsing

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is absent: pip install 'sae-italian[dev]'")
pytestmark = NEEDS_CHROMIUM
SENTENCE = "Le ragazze italiane hanno letto un libro."


@pytest.fixture(scope="module")
def address(opened) -> Iterator[str]:
    with browsing(create_app(*opened)) as found:
        yield found


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A fresh page in Italian that fails the test on any script error and on any request but to loopback."""
    context = chromium.new_context(locale="it-IT", color_scheme="light", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(30_000)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    ours = ("http://127.0.0.1:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(ours) else troubles.append(request.url))
    page.troubles = troubles
    yield page
    context.close()
    assert troubles == []


def show(page: Any, address: str, latent: int | None = None) -> None:
    page.goto(address + ("" if latent is None else f"#latent={latent}"))
    page.wait_for_selector(".latents tbody th a" if latent is None else '[data-part="explain"]')
    page.wait_for_selector('[data-part="sentence"]:visible')


def work(page: Any, name: str, **fields: str) -> Any:
    """Fill a form of live work, send it, wait for the end, and return its part of the page."""
    part = page.locator(f'[data-part="{name}"]:visible')
    for field, value in fields.items():
        part.locator(f'[name="{field}"]').fill(value)
    part.locator(".live-go").press("Enter")  # what is drawn late moves a button away between a mouse's down and up
    ended = (
        "name => [...document.querySelectorAll(`[data-part='${name}']`)].some((part) => part.offsetParent && "
        "part.querySelector('.live-status').textContent && !part.querySelector('.live-go').disabled)"
    )
    until(page, ended, name)
    return part


def test_a_sentences_latents_by_token_and_overall(tab: Any, address: str, live) -> None:
    show(tab, address)
    assert tab.locator("[data-part]:visible").count() == 1  # on the list's page only the sentence
    part = work(tab, "sentence", sentence=SENTENCE)
    expected = live.tokens(SENTENCE)
    assert part.locator(".piece").count() == len(expected["tokens"])
    assert part.locator(".live-strongest tbody tr:visible").count() == 10
    part.locator(".live-strongest button").click()
    strongest = [int(text) for text in part.locator(".live-strongest tbody th a").all_inner_texts()]
    assert strongest == [one["latent"] for one in expected["strongest"]]
    part.locator(".piece").nth(2).click()
    shown = [int(text) for text in part.locator(".live-detail tbody th a").all_inner_texts()]
    assert shown == [latent for latent, _ in expected["tokens"][2]["latents"]]
    part.locator(".live-strongest tbody th a").first.click()
    tab.wait_for_selector('[data-part="steer"]')
    assert tab.inner_text(".card-page .which").endswith(f" {strongest[0]}")
    part = work(tab, "sentence")  # the text is still there, now tinted by this latent
    heats = part.locator(".piece").evaluate_all("nodes => nodes.map((node) => +node.style.getPropertyValue('--heat'))")
    assert max(heats) == 1 and part.locator(".live-strongest tr.selected").count() == 1


def test_steering_compares_continuations(tab: Any, address: str, live, active) -> None:
    show(tab, address, active)
    part = work(tab, "steer", prompt="La ragazza", strengths="-2; 4,5")
    expected = live.call("steer", {"latent": active, "prompt": "La ragazza", "strengths": [-2, 4.5]})
    written = part.locator(".written").all_inner_texts()
    assert [" ".join(text.split()) for text in written] == [
        " ".join(one["text"].split()) for one in (expected["unsteered"], *expected["steered"])
    ]
    assert part.locator("tbody th").all_inner_texts() == ["senza", "−2,00", "+4,50"]
    assert "KL del primo token (nat)" in part.locator("thead").inner_text()
    assert "× massimo" in part.locator("label").nth(1).inner_text()
    part = work(tab, "steer", strengths="forte")
    assert "da 1 a 6 numeri" in part.locator(".live-status[role=alert]").inner_text()
    part = work(tab, "steer", strengths="1000")
    assert "100" in part.locator(".live-status").inner_text()
    tab.troubles[:] = [text for text in tab.troubles if "422" not in text]  # the browser logs a refusal


def test_a_card_is_tried_on_a_text_that_fires(tab: Any, address: str, live, opened, active) -> None:
    """What the boxes hold at first: the top passage, up to the token that fires; strengths within the maximum."""
    show(tab, address, active)
    tab.click(".try")
    box = tab.locator('[data-part="sentence"]:visible textarea')
    text = box.input_value()
    top = opened[0].card(active)["groups"][0]["contexts"][0]
    assert text and "".join(piece for piece, _ in top["segments"]).strip().startswith(text)
    assert box.evaluate("(node) => node === document.activeElement")
    assert tab.input_value('[data-part="ablate"] textarea') == text
    assert tab.input_value('[data-part="steer"] input') == "-1 0,5 1"
    part = work(tab, "ablate")
    assert part.locator("tbody tr").count() > 0 and "KL del token seguente" in part.locator("thead").inner_text()


def test_a_sentence_in_the_address_is_read_at_once(tab: Any, address: str) -> None:
    tab.set_viewport_size({"width": 1440, "height": 900})
    tab.goto(address + "#sentence=La+ragazza+legge")
    tab.wait_for_selector(".home .piece")
    assert tab.locator(".home .piece").all_text_contents() == ["La", "␣ragazza", "␣legge"]
    tab.goto("about:blank")
    tab.goto(address)
    tab.wait_for_selector(".worth li")
    for width, most in ((1440, 500), (768, 900), (360, 900)):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.locator(".home textarea").is_visible()
        assert tab.evaluate("document.querySelector('.worth').getBoundingClientRect().top + scrollY") < most
    work(tab, "sentence", sentence="Il cane dorme")
    assert "sentence=Il+cane+dorme" in tab.url


def test_ablation_and_an_explanation_now(tab: Any, address: str, live) -> None:
    latent = live.tokens("La ragazza legge")["strongest"][0]["latent"]
    show(tab, address, latent)
    part = work(tab, "ablate", prompt="La ragazza legge")
    expected = live.call("ablate", {"latent": latent, "prompt": "La ragazza legge"})
    assert part.locator("tbody tr").count() == expected["n_active"]
    assert part.locator(".moves li").count() > 0
    part = work(tab, "explain")
    rule = live.explain(latent)["explanations"][0]
    assert part.locator("[data-explainer=rule]").inner_text().startswith(rule["text_it"] or "Troppo poche")


def test_keys_language_theme_and_a_narrow_screen(tab: Any, address: str, active) -> None:
    show(tab, address, active)
    field = tab.locator('[data-part="sentence"]:visible textarea')
    field.fill("")
    field.press_sequentially("jk/")
    assert field.input_value() == "jk/" and tab.url.endswith(f"#latent={active}")
    tab.click('[data-lang="en"]')
    tab.wait_for_selector("text=Try this latent live")
    tab.click(".theme")
    for width in (1280, 360):
        tab.set_viewport_size({"width": width, "height": 800})
        work(tab, "sentence", sentence=SENTENCE)
        wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} px too wide at {width}"
    assert tab.evaluate(NAMELESS) == []
    assert tab.evaluate(LOW_CONTRAST) == []


@pytest.mark.parametrize("text", [SCRIPT, RTL, CONTROL, LONG_WORD[:10_000]], ids=["script", "rtl", "control", "long"])
def test_nasty_texts_are_shown_and_harmless(tab: Any, nasty, text: str) -> None:
    with browsing(create_app(*nasty)) as address:
        show(tab, address)
        part = work(tab, "sentence", sentence=text)
        assert part.locator(".piece").count() > 3
        part.locator(".piece").first.click()
        latent = int(part.locator(".live-strongest tbody th a").first.inner_text())
        show(tab, address, latent)
        assert tab.locator(".context").count() > 0
        assert tab.evaluate("window.harm") is None
        assert tab.locator(".sae-italian script, .sae-italian img").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0


def test_a_replaced_cache_and_a_stopped_server_are_said_in_words(tab: Any, opened, tmp_path) -> None:
    folder = shutil.copytree(opened[0].cache.folder, tmp_path / "cache")
    source, _ = open_with_live(FeatureCache.open(folder), opened[1].tokenizer, sae=opened[1].sae, model=opened[1].model)
    with browsing(create_app(source, opened[1])) as address:
        show(tab, address)
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        part = work(tab, "sentence", sentence="ciao")
        assert "La cache è stata sostituita" in part.locator(".live-status").inner_text()
        tab.goto(address + "#latent=3")
        tab.wait_for_selector(".card-page .notice:has-text('La cache è stata sostituita')")
    part = work(tab, "sentence", sentence="ciao")
    assert "Il server non risponde" in part.locator(".live-status").inner_text()
    tab.troubles[:] = [text for text in tab.troubles if "409" not in text and "ERR_CONNECTION" not in text]


def test_without_live_work_the_page_is_the_static_one(tab: Any, opened) -> None:
    with browsing(create_app(opened[0])) as address:
        tab.goto(address)
        tab.wait_for_selector(".latents tbody th a")
        assert tab.locator("[data-part]").count() == 0
        tab.fill("#search" if tab.locator("#search").count() else "input[type=search]", "a")


def test_the_tints_of_a_sentence_have_contrast(tab: Any, address: str, active) -> None:
    """As those of the passages: 3 to 1 for the strongest and for the line under what fires, 4.5 to 1 for all letters."""
    show(tab, address, active)
    work(tab, "sentence", sentence=tab.input_value('[data-part="sentence"]:visible textarea') + "\n  e poi\n \u202eabc")
    tab.evaluate("document.querySelectorAll('.words mark').forEach((mark) => mark.remove())")
    for theme in ("light", "dark"):
        tab.evaluate("(theme) => { document.querySelector('.sae-italian').dataset.theme = theme; }", theme)
        for heat in ("1", "0.01"):
            tab.evaluate(
                "(x) => document.querySelectorAll('.piece').forEach((p) => p.style.setProperty('--heat', x))", heat
            )
            found = tab.evaluate(MARKS)
            assert tab.evaluate(LOW_CONTRAST) == [] and found["text"] >= 4.5 and found["line"] >= 3, (
                theme,
                heat,
                found,
            )
            assert heat != "1" or found["strongest"] >= 3, (theme, found)


def test_what_fails_on_a_card_is_said_as_an_error(tab: Any, opened, compared, active) -> None:
    """The width that asks for the window, and the other SAE: in the page's language, as an alert."""
    with browsing(create_app(*opened, other=compared)) as address:
        show(tab, address, active)
        for asked, control, place in (
            ("**/api/wide/*", '[data-width="window"]', ".contexts-panel .note[role=alert]"),
            ("**/api/other/card/*", ".compare summary", ".other-sae [role=alert]"),
        ):
            tab.route(asked, lambda route: route.abort())
            tab.click(control)
            tab.wait_for_selector(place)
            assert tab.inner_text(place) == "Il server non risponde: è ancora in funzione?"
        tab.click('[data-width="words"]')
        assert tab.locator(".contexts-panel [role=alert]").count() == 0
    tab.troubles.clear()  # the browser logs what was aborted


def test_another_sae_is_compared_on_the_server(tab: Any, opened, compared, active) -> None:
    with browsing(create_app(*opened, other=compared)) as address:
        show(tab, address, active)
        tab.click(".compare summary")
        tab.wait_for_selector(".other-sae .which")
        match = compared.matches["latent"][active]
        assert tab.inner_text(".other-sae .which").endswith(f" {match}")
        assert f"latente {match}: coseno" in tab.inner_text(".other-sae .match")
        tab.keyboard.press("Escape")
        tab.wait_for_selector(".latents tbody th a")


def test_an_explanation_made_now_goes_onto_the_card(tab: Any, opened, live, tmp_path) -> None:
    folder = shutil.copytree(live.cache.folder, tmp_path / "cache", ignore=shutil.ignore_patterns("*.sqlite*"))
    served = open_with_live(FeatureCache.open(folder), live.tokenizer, sae=live.sae, model=live.model)
    latent = next(i for i, e in opened[0].explanations["rules"].items() if e.status == "ok")
    with browsing(create_app(*served)) as address:
        show(tab, address, latent)
        assert tab.inner_text(".card-head .lead") == "Nessuna spiegazione"
        part = work(tab, "explain")
        text = part.locator("[data-explainer=rule]").inner_text()
        part.locator("[data-kept=yes] button").click()
        tab.wait_for_selector(".explanations .made-now", state="attached")
        assert text.startswith(tab.inner_text(".card-head .lead")) and "su richiesta" in tab.text_content(
            ".explanations"
        )
        tab.reload()
        tab.wait_for_selector(".explanations .made-now", state="attached")
        tab.keyboard.press("Escape")
        tab.wait_for_selector(f'.latents tr[data-latent="{latent}"] .tag')


def test_a_search_by_meaning_lists_the_nearest_latents(tab: Any, opened, monkeypatch) -> None:
    """With an encoder the first screen has a box for it; the rows are those of `near`, each opens its card."""
    monkeypatch.setattr("sae_italian.browser.opening.encode", letters)
    with browsing(create_app(*opened, encoder="letters")) as address:
        show(tab, address)
        assert tab.locator('[data-part="near"]:visible').count() == 1
        part = work(tab, "near", meaning="il gatto")
        shown = [int(text) for text in part.locator("tbody th a").all_inner_texts()]
        assert (
            shown == [one["latent"] for one in nearest_in_meaning(opened[0], "letters", "il gatto")]
            and len(shown) == N_NEAR
        )
        part.locator("tbody th a").first.click()
        tab.wait_for_selector(f".card-page .which:text-is('Latente {shown[0]}')")
        work(tab, "sentence")  # the card's own live work is as it was


def test_the_width_switch_offers_the_whole_window(tab: Any, address: str, active) -> None:
    show(tab, address, active)
    lengths = []
    for width in ("words", "sentence", "all", "window"):
        tab.click(f'.contexts-panel [data-width="{width}"]')
        tab.wait_for_selector(f'.contexts-panel [data-width="{width}"][aria-pressed="true"]')
        until(tab, "wide => Boolean(document.querySelector('.window-text')) === wide", arg=width == "window")
        texts = tab.locator(".context .words").all_text_contents()  # inner text leaves out what was not drawn yet
        lengths.append((len(texts), sum(map(len, texts))))
    assert len({n for n, _ in lengths}) == 1
    assert lengths[3][1] > lengths[2][1] > max(lengths[0][1], lengths[1][1])
    box = "(box) => { const [a, b] = [box, box.querySelector('.peak-word')].map((e) => e.getBoundingClientRect());"
    box += " return b.top >= a.top && b.bottom <= a.bottom; }"
    until(tab, f"[...document.querySelectorAll('.window-text')].every({box})")  # the chosen token is in sight
    tab.reload()
    tab.wait_for_selector(".window-text")  # remembered
    tab.click('[data-lang="en"]')
    tab.wait_for_selector("text=whole window")
    tab.set_viewport_size({"width": 360, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    assert tab.evaluate(NAMELESS) == []


# --- the widget ------------------------------------------------------------------------------------------------------------

LAB_CSS = """
.lab a { text-decoration: unset; color: unset; }
.lab button { border-radius: 0; font-family: monospace; }
.lab pre { border: none; margin: 0; padding: 0; white-space: pre-wrap; }
.lab dl, .lab dt, .lab dd { display: block; }
.lab dl { width: 100%; overflow: hidden; padding: 0; margin: 0; }
.lab dt { font-weight: bold; float: left; width: 20%; padding: 0; margin: 0; }
.lab dd { float: left; width: 80%; padding: 0; margin: 0; }
.lab table { table-layout: fixed; font-size: 12px; margin: auto; } .lab td, .lab th { text-align: right; padding: 0.5em; }
"""  # JupyterLab 4.6's rules for what a cell shows
LOOKS = """(selector) => [...document.querySelectorAll(selector)].map((node) => {
  const style = getComputedStyle(node);
  const names = ["display", "float", "width", "fontSize", "color", "textAlign", "padding", "textDecorationLine", "borderRadius"];
  return node.tagName + " " + names.map((name) => style[name]).join(" ");
})"""
HOST = """async ({ esm, css, state }) => {
  document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
  const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
  const handlers = new Set();
  const model = {
    get: (name) => state[name],
    on: (_, handler) => handlers.add(handler),
    off: (_, handler) => handlers.delete(handler),
    send: async (message) => {
      const reply = JSON.parse(await window.kernel(JSON.stringify(message)));
      for (const handler of handlers) handler(reply);
    },
  };
  const el = document.body.appendChild(document.createElement("div"));
  el.className = "lab";
  window.undo = await module.default.render({ model, el });
}"""


def looks_with(page: Any, *sheets: str) -> list[str]:
    """Return what the card looks like under these style sheets and no other."""
    page.evaluate("() => document.querySelectorAll('style').forEach((sheet) => sheet.remove())")
    for sheet in sheets:
        page.add_style_tag(content=sheet)
    return page.evaluate(LOOKS, ".lab .sae-italian *")


def test_the_widget_shows_a_card_and_works_live_by_messages(tab: Any, opened, active) -> None:
    pytest.importorskip("anywidget", reason="needs the notebook extra")
    from sae_italian.browser.widget import widget_class

    kind = widget_class()

    def kernel(text: str) -> str:
        message = json.loads(text)
        try:
            return json.dumps(
                {"id": message["id"], "value": PageAnswers(*opened)(message["name"], message["argument"])}
            )
        except Exception as error:
            return json.dumps({"id": message["id"], "error": str(error)})

    tab.expose_function("kernel", kernel)
    state = {"latent": active, "permalink": "show('cache', latent=LATENT)"}
    tab.evaluate(HOST, {"esm": str(kind._esm), "css": str(kind._css), "state": state})
    tab.wait_for_selector('[data-part="steer"]')
    assert looks_with(tab, LAB_CSS, str(kind._css)) == looks_with(tab, style())  # nothing of ours is changed
    assert tab.inner_text(".card-page .which").endswith(f" {active}")
    part = work(tab, "sentence", sentence=SENTENCE)
    assert part.locator(".piece").count() == len(opened[1].tokens(SENTENCE)["tokens"])
    part = work(tab, "steer", prompt="La", strengths="1e9")
    assert "100" in part.locator(".live-status").inner_text()
    tab.locator(".card-page .back").click()
    tab.wait_for_selector(".latents tbody th a")
    height = "document.querySelector('.sae-italian').offsetHeight"
    assert tab.evaluate(height) <= 720 and tab.evaluate("document.querySelector('.latents').offsetHeight") > 2000
    ground = "getComputedStyle(document.querySelector('.sae-italian')).backgroundColor"
    colours = []
    for light in ("false", "true"):  # as JupyterLab says it
        tab.evaluate("(light) => { document.body.dataset.jpThemeLight = light; }", light)
        until(
            tab,
            f"() => document.querySelector('.sae-italian').dataset.theme === '{'light' if light == 'true' else 'dark'}'",
        )
        colours.append(tab.evaluate(ground))
    assert colours == ["rgb(18, 21, 20)", "rgb(247, 248, 247)"]
    tab.evaluate("document.querySelector('.sae-italian').scrollTo(0, 900)")
    until(tab, "document.querySelectorAll('tr[data-latent]').length > 5")
    tab.evaluate("window.undo()")
    until(tab, "document.querySelectorAll('.latents').length === 0")
