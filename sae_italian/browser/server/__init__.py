"""The browser on this machine: a small server on loopback, with live work (pip install 'sae-italian[serve]')."""

from __future__ import annotations

from sae_italian.browser.server.app import create_app
from sae_italian.browser.server.run import serve

__all__ = ["create_app", "serve"]
