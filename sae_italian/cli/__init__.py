"""The command line: `main` runs one command and returns its exit code."""

from sae_italian.cli.app import main

__all__ = ["main"]
