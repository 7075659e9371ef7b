"""Ties and adapters."""
