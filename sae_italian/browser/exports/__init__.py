"""A cache's latents in the formats of other tools, each export checked against the table of fields before it is done."""

from __future__ import annotations

from sae_italian.browser.exports.write import FORMATS, Export, export

__all__ = ["FORMATS", "Export", "export"]
