"""The browser that the pages are opened in."""

from __future__ import annotations

import shutil
import time
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is absent: apt-get install chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def until(page: Any, expression: str, arg: Any = None, seconds: float = 30) -> None:
    """Wait until a JavaScript expression, or a function of `arg`, is true on a page; fails after `seconds`.

    Playwright's own wait evaluates a text inside the page from the second look on, which our pages' policy refuses.
    """
    end = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        if time.monotonic() > end:
            pytest.fail(f"after {seconds} s it is not true that {expression}, of {arg!r}")
        page.wait_for_timeout(20)
