"""What mkdocs is told while it builds: the page of commands is written from the commands themselves."""

from typing import Any

from sae_italian import cli as app


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri != "commands.md":
        return markdown
    return markdown + app.build().generate_docs(output_format="markdown", recursive=True, heading_level=2)
