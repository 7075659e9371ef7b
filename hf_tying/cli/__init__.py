"""The `hf-tying` command."""

from .app import main

__all__ = ["main"]
