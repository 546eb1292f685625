"""The pictures of README.md and docs/browser.md, taken of a browser's folder in headless Chromium."""

from __future__ import annotations

import argparse
from typing import Any

from sae_italian.base.errors import UsageError
from tests.browser.chromium import CHROMIUM, FLAGS

SIZE = {"width": 1280, "height": 800}


def take_pictures(options: argparse.Namespace) -> tuple[Any, str]:
    """Write `home.png` and `card.png` (the first latent worth opening) of `options.report` into `options.out`.

    Raises: UsageError where there is no browser's folder, or no Chromium.
    """
    index = options.report / "index.html"
    if CHROMIUM is None or not index.is_file():
        raise UsageError(f"{index} and Chromium are needed: sae-italian browse CACHE; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=SIZE, device_scale_factor=1.5, locale="it-IT")
        page.goto(index.resolve().as_uri())
        page.wait_for_selector(".worth li")
        page.screenshot(path=options.out / "home.png")
        page.locator(".worth a").nth(options.nth).click()
        page.wait_for_selector(".card .words")
        page.screenshot(path=options.out / "card.png")
        browser.close()
    names = [str(options.out / name) for name in ("home.png", "card.png")]
    return names, "\n".join(names)
