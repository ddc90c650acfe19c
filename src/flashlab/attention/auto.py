"""Placeholder until the table lands."""
from typing import NamedTuple

from flashlab.attention import backends
from flashlab.attention.spec import AttentionSpec

ORDER = {
    "cuda": ("flash_attention_2", "sdpa_flash", "sdpa_efficient", "sdpa_math", "standard"),
    "cpu": ("sdpa_flash", "sdpa_math", "standard"),
}
class Choice(NamedTuple):
    backend: str
    source: str
    refused: tuple[tuple[str, str], ...] = ()
def choose(spec: AttentionSpec) -> Choice:
    refused = []
    for name in ORDER.get(spec.device.type, ("sdpa_math", "standard")):
        if (reason := backends.why_not(name, spec)) is None:
            break
        refused.append((name, reason))
    return Choice(name, "fixed order: nothing was measured", tuple(refused))
