"""The pages that people look at: a static latent browser, written from records that others compute, and in a notebook."""

from sae_italian.browser.live import Live
from sae_italian.browser.source import LatentSource
from sae_italian.browser.widget import show
from sae_italian.browser.write import write_browser

__all__ = ["LatentSource", "Live", "show", "write_browser"]
