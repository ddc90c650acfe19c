"""Exact attention behind one interface; ``backends.py`` is the table of implementations."""

from flashlab.attention.interface import AttentionSpec, BackendUnavailable, attention, resolve

__all__ = ["AttentionSpec", "BackendUnavailable", "attention", "resolve"]
