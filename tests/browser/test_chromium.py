"""The page in a real browser, opened from disk: what a person sees, types and presses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_italian.browser import write_browser
from tests.browser.fake_browser import make_card, make_data

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is absent: pip install 'sae-italian[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: apt-get install chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
EVIL = "<script>window.harm=1</script><img src=x onerror='window.harm=1'> \u202eoiggassem\u202c \u2067\u05e9\u05dc\u05d5\u05dd"
TO_SCREEN = """([x, y]) => {
  const point = new DOMPoint(x, y).matrixTransform(document.querySelector(".scatter svg").getScreenCTM());
  return [point.x, point.y];
}"""
LONG_WORD = "precipitevolissimevolmente" * 400


def evil_data() -> tuple[Any, list[Any], list[Any]]:
    """Return a small run whose texts try everything that a corpus may hold."""
    run, rows, _ = make_data(16)
    rows[0].update(
        explanation_it=EVIL, explanation_en=EVIL, top_tokens=["\u202e", "\n", " ", "", LONG_WORD, "\ufeff"], gold=[EVIL]
    )
    rows[1].update(explanation_it="molto lunga " * 420, explanation_en=LONG_WORD)
    cards: list[Any] = [make_card(row) for row in rows]
    segments = [
        ("  due  spazi\n", 0.0),
        (EVIL, 1.0),
        (LONG_WORD, 2.0),
        ("\u05e9\u05dc\u05d5\u05dd", 0.0),
        ("</script>", 3.0),
    ]
    cards[0]["groups"][0]["contexts"].insert(0, {"doc_id": EVIL, "source": EVIL, "max": 3.0, "segments": segments})
    cards[0]["rule"] = {"pattern": EVIL}
    cards[0]["promoted"][0]["token"] = " \t\n\u202e"
    return {**run, "title": EVIL, "model_note": EVIL}, rows, cards


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, rows, cards = make_data(120)
    return write_browser(tmp_path_factory.mktemp("pages") / "con spazi & à", run, rows, cards(), cards_per_shard=16)


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A fresh page in Italian at 1280 px that fails the test on any script error or outside request."""
    context = chromium.new_context(locale="it-IT", color_scheme="light", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(5000)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request",
        lambda request: troubles.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
    )
    yield page
    context.close()
    assert troubles == []


def show(page: Any, index: Path, fragment: str = "") -> None:
    page.goto(index.as_uri() + fragment)
    page.wait_for_selector("#card h1" if fragment else ".latents tbody tr")


def latents(page: Any) -> list[int]:
    return [int(number) for number in page.locator(".latents tbody th a").all_inner_texts()]


def test_overview_shows_facts_metrics_controls_and_rows(tab: Any, folder: Path) -> None:
    show(tab, folder)
    assert tab.inner_text("h1") == "Minerva-350M, residuo dello strato 8"
    assert "blocks.8.hook_resid_post" in tab.inner_text(".facts")
    assert re.search(r"97,3\s%\s+\[96,9; 97,7\]", tab.inner_text('[data-metric="ce"]'))
    assert "[0,491; 0,515]" in tab.inner_text('[data-metric="shuffled"]')
    assert tab.locator(".latents tbody tr").count() == 50
    assert "1–50 di 120" in tab.inner_text(".pager")


def test_search_ignores_accents_and_case(tab: Any, folder: Path) -> None:
    show(tab, folder)
    tab.fill("#search", "PERCHE causale")
    rows = tab.locator(".latents tbody tr").all_inner_texts()
    assert 0 < len(rows) < 50 and all("«perché», causale" in row for row in rows)
    tab.fill("#search", "zzz")
    assert tab.locator(".latents").is_hidden() and tab.locator(".empty").is_visible()


def test_sort_filter_and_pages(tab: Any, folder: Path) -> None:
    show(tab, folder)
    tab.click('.latents [data-sort="latent"]')
    assert latents(tab) == list(range(50))
    tab.click('.pager button[aria-label="Pagina successiva"]')
    assert latents(tab) == list(range(50, 100))
    tab.click('.latents [data-sort="latent"]')
    assert latents(tab)[0] == 119
    assert tab.get_attribute("th.c-latent", "aria-sort") == "descending"
    for name, test in (("dead", "morto"), ("few", "troppo poche attivazioni"), ("gold", "=")):
        tab.click(f'[data-filter="{name}"]')
        assert all(test in text for text in tab.locator(".latents tbody tr").all_inner_texts())
    tab.click('[data-filter="explained"]')
    assert all(
        float(text.split()[0].replace(",", ".")) >= 0.8 for text in tab.locator("td.c-detection").all_inner_texts()
    )


def test_a_row_opens_its_card_with_marks(tab: Any, folder: Path) -> None:
    show(tab, folder)
    latent = latents(tab)[2]
    tab.locator(".latents tbody tr").nth(2).locator(".clamp").click()
    tab.wait_for_selector("#card mark")
    assert tab.url.endswith(f"#latent={latent}") and tab.title().startswith(f"Latente {latent} · ")
    assert tab.locator("#overview").is_hidden()
    marks = tab.locator("#card mark").evaluate_all(
        "(all) => all.map((m) => [m.title, Number(m.style.getPropertyValue('--heat'))])"
    )
    assert marks and all(title.startswith("attivazione ") and 0 < heat <= 1 for title, heat in marks)
    assert {"Punteggi", "Contesti", "Attivazioni non nulle", "Token promossi"} <= set(
        tab.locator("#card h2").all_inner_texts()
    )
    assert "Solo il token" in tab.inner_text(".scores")
    tab.go_back()
    assert tab.locator(".latents tr.selected a").inner_text() == str(latent)


def test_context_text_is_the_true_text(tab: Any, folder: Path) -> None:
    _, rows, _ = make_data(120)
    group = make_card(rows[5])["groups"][0]["contexts"]
    show(tab, folder, "#latent=5")
    shown = tab.locator("#card .context-group").first.locator(".words").all_text_contents()
    assert shown == ["".join(text for text, _ in context["segments"]) for context in group[:5]]
    tab.click("text=Altri 3 contesti")
    assert tab.locator("#card .context-group").first.locator(".words").count() == 8


def test_permalink_next_and_unknown_latent(tab: Any, folder: Path) -> None:
    show(tab, folder, "#latent=77")
    assert tab.inner_text("#card h1") == "Latente 77"
    tab.goto(folder.as_uri() + "#latent=9999")
    assert "9999 non è in questa cartella" in tab.inner_text("#card .notice")
    tab.click(".back")
    tab.wait_for_selector(".latents")


def test_keyboard(tab: Any, folder: Path) -> None:
    show(tab, folder)
    order = latents(tab)
    for key in ("j", "j", "j", "k"):
        tab.keyboard.press(key)
    assert tab.locator("tr.selected a").inner_text() == str(order[1])
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f"#card h1:text-is('Latente {order[1]}')")
    tab.keyboard.press("j")
    tab.wait_for_selector(f"#card h1:text-is('Latente {order[2]}')")
    tab.keyboard.press("k")
    tab.wait_for_selector(f"#card h1:text-is('Latente {order[1]}')")
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".latents")
    tab.keyboard.press("/")
    tab.keyboard.type("perche")
    assert tab.input_value("#search") == "perche"
    found = latents(tab)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f"#card h1:text-is('Latente {found[0]}')")
    tab.keyboard.press("/")
    tab.wait_for_selector("#search:focus")
    tab.keyboard.press("Escape")
    tab.keyboard.press("Escape")
    assert tab.input_value("#search") == "" and tab.locator("tbody tr").count() >= 50


def test_keyboard_walks_over_pages(tab: Any, folder: Path) -> None:
    show(tab, folder)
    for _ in range(51):
        tab.keyboard.press("j")
    assert "51–100 di 120" in tab.inner_text(".pager")
    assert tab.evaluate("document.activeElement.closest('tr').rowIndex") == 1


def test_language_switch_is_remembered(tab: Any, folder: Path) -> None:
    show(tab, folder)
    assert tab.get_attribute("html", "lang") == "it"
    tab.click('[data-lang="en"]')
    assert tab.get_attribute("html", "lang") == "en"
    assert "Explained variance, centred" in tab.inner_text(".metrics >> nth=0") and "0.812" in tab.inner_text(
        ".metrics >> nth=0"
    )
    tab.reload()
    tab.wait_for_selector(".latents")
    assert tab.get_attribute("#search", "placeholder") == "Search explanations and tokens"


def test_theme_switch_is_remembered(tab: Any, folder: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    show(tab, folder)
    light = tab.evaluate(ground)
    tab.click(".theme")
    dark = tab.evaluate(ground)
    assert dark != light and tab.get_attribute(".theme", "aria-label") == "Passa al tema chiaro"
    tab.reload()
    assert tab.evaluate(ground) == dark
    tab.click(".theme")
    assert tab.evaluate(ground) == light


def test_storage_may_be_refused(tab: Any, folder: Path) -> None:
    tab.add_init_script("Object.defineProperty(window, 'localStorage', { get() { throw new Error('refused'); } })")
    show(tab, folder)
    tab.click('[data-lang="en"]')
    tab.click(".theme")
    assert tab.get_attribute("html", "lang") == "en"


def test_gold_labels_sort_and_link(tab: Any, folder: Path) -> None:
    show(tab, folder)
    tab.click(".gold summary")
    tab.click('.gold [data-sort="n"]')
    first = tab.locator(".gold tbody").first
    counts = [int(text.replace(".", "")) for text in first.locator("tr:not(.group) td:nth-child(2)").all_inner_texts()]
    assert counts == sorted(counts, reverse=True)
    link = first.locator("a").first
    latent = link.inner_text()
    link.click()
    tab.wait_for_selector(f"#card h1:text-is('Latente {latent}')")


def test_scatter_opens_the_latent_under_the_pointer(tab: Any, folder: Path) -> None:
    show(tab, folder)
    tab.fill("#search", "condizionale")
    x, y = map(float, re.match(r"M(\S+) (\S+?)h0", tab.get_attribute(".dots.shown", "d")).groups())  # type: ignore[union-attr]
    latent = latents(tab)[0]
    spot = tab.evaluate(TO_SCREEN, [x, y])
    tab.mouse.move(*spot)
    assert tab.inner_text(".readout").startswith(f"{latent} · ")
    tab.mouse.click(*spot)
    tab.wait_for_selector(f"#card h1:text-is('Latente {latent}')")


def test_latents_without_scores_or_card(tab: Any, tmp_path: Path) -> None:
    run, rows, _ = make_data(3)
    for row in rows:
        row.update(
            detection=None,
            detection_lo=None,
            detection_hi=None,
            fuzzing=None,
            gain=None,
            explanation_it="",
            explanation_en="",
            kind="",
        )
    index = write_browser(tmp_path / "out", {**run, "metrics": [], "controls": [], "gold": [], "k": None}, rows, [])
    show(tab, index)
    assert "Nessuna spiegazione" in tab.inner_text(".latents") and tab.locator(".scatter").count() == 0
    show(tab, index, "#latent=1")
    assert "non c’è una scheda" in tab.inner_text("#card")


@pytest.mark.parametrize("width", [1280, 360])
def test_evil_text_is_only_text(tab: Any, tmp_path: Path, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    index = write_browser(tmp_path / "out", *evil_data())
    fits = "document.documentElement.scrollWidth <= innerWidth"
    show(tab, index)
    assert tab.text_content("h1") == EVIL and tab.title() == EVIL.replace("  ", " ")
    assert EVIL in tab.text_content('tr[data-latent="0"] .clamp') and tab.evaluate(fits)
    assert tab.locator('tr[data-latent="0"] .tok').all_text_contents()[:4] == ["U+202E", "↵", "␣", "∅"]
    show(tab, index, "#latent=0")
    words = tab.locator("#card .words").first.text_content()
    assert (
        words.startswith("  due  spazi\n" + EVIL)
        and words.endswith("\u05e9\u05dc\u05d5\u05dd</script>")
        and tab.evaluate(fits)
    )
    assert tab.locator("#card .half .tok").first.text_content() == "␣⇥↵U+202E"
    show(tab, index, "#latent=1")
    tab.wait_for_selector("#card h1:text-is('Latente 1')")
    folded = tab.locator(".lead").bounding_box()["height"]
    tab.click("#card .card-head .link")
    assert tab.locator(".lead").bounding_box()["height"] > folded and tab.evaluate(fits)
    tab.click('[data-lang="en"]')
    assert tab.evaluate(fits)
    assert tab.evaluate(
        "window.harm === undefined && document.scripts.length === 8 && !document.querySelector('#app img')"
    )


def test_a_missing_shard_is_said(chromium: Any, tmp_path: Path) -> None:
    run, rows, cards = make_data(4)
    index = write_browser(tmp_path / "out", run, rows, cards())
    (index.parent / "data" / "cards" / "0000.js").unlink()
    page = chromium.new_page(locale="it-IT")
    page.goto(index.as_uri() + "#latent=2")
    page.wait_for_selector("#card .notice")
    assert "data/cards/0000.js" in page.inner_text("#card .notice")
    page.close()


def test_without_javascript_the_page_says_what_to_do(chromium: Any, folder: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(folder.as_uri())
    assert "Minerva-350M" in page.inner_text("h1") and "JavaScript" in page.inner_text("main")
    context.close()
