"""Exact attention behind one interface; ``backends.py`` is the table of implementations."""

from flashlab.attention.interface import (
    BackendUnavailable,
    attention,
    attention_packed,
    attention_qkvpacked,
    attention_with_kvcache,
    resolve,
)
from flashlab.attention.spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "BackendUnavailable",
    "attention",
    "attention_packed",
    "attention_qkvpacked",
    "attention_with_kvcache",
    "resolve",
]
