"""Which backend can do what, asked of `backends.why_not` alone."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from flashlab.attention import backends
from flashlab.attention.spec import AttentionSpec

Row = dict[str, Any]

# The plain call that every feature changes.
PLAIN: dict[str, Any] = {
    "batch_size": 2,
    "seqlen_q": 512,
    "seqlen_k": 512,
    "num_heads": 8,
    "num_kv_heads": 8,
    "head_dim": 64,
}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "sliding window, causal": {"causal": True, "window_size": (255, 0)},
    "sliding window, both sides": {"window_size": (255, 255)},
    "ALiBi": {"causal": True, "alibi": True},
    "softmax scale": {},  # every call has one
    "soft cap": {"causal": True, "softcap": True},
    "grouped heads": {"causal": True, "num_kv_heads": 2},
    "multi-query": {"causal": True, "num_kv_heads": 1},
    "Sq < Sk": {"seqlen_q": 128},
    "Sq > Sk": {"seqlen_k": 128},
    "causal, Sq < Sk": {"causal": True, "seqlen_q": 128},
    "causal, Sq > Sk": {"causal": True, "seqlen_k": 128},
    "packed": {"causal": True, "layout": "packed"},
    "key-value cache, one token": {"causal": True, "layout": "cache", "seqlen_q": 1},
    "key-value cache, several tokens": {"causal": True, "layout": "cache", "seqlen_q": 4},
    "block-sparse": {"block_sparse": True},
    "deterministic backward": {"causal": True, "deterministic": True},
    "infinity in k": {"infinities": True},
    "infinity in k, float32": {"infinities": True, "dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    **{f"head_dim {head_dim}": {"head_dim": head_dim} for head_dim in (32, 64, 96, 128, 192, 256)},
}


def examine(device: torch.device) -> list[Row]:
    """Ask every backend about every feature on a device, without and with gradients.

    Returns:
        A row for each pair: its status is "ok", "forward only" (no gradients, for the reason given) or "unsupported".
    """
    plain = AttentionSpec(**PLAIN, dtype=torch.bfloat16, device=device)
    return [
        _ask(name, feature, replace(plain, **FEATURES[feature])) for feature in FEATURES for name in backends.BACKENDS
    ]


def _ask(name: str, feature: str, spec: AttentionSpec) -> Row:
    status, reason = "ok", backends.why_not(name, spec)
    if reason is not None:
        status = "unsupported"
    elif spec.layout != "cache" and (reason := backends.why_not(name, replace(spec, needs_grad=True))) is not None:
        status = "forward only"
    return {"feature": feature, "backend": name, "status": status, "reason": reason}


class Summary(NamedTuple):
    """The support table, laid out.

    Attributes:
        header: The backends that support anything.
        lines: A feature and its cells: "ok", "forward" (no gradients) or nothing, with the number of the reason.
        reasons: The reasons, the first of which has number 1.
        absent: A sentence for the backends that support nothing, with their reason for the plainest call.
    """

    header: list[str]
    lines: list[list[str]]
    reasons: list[str]
    absent: list[str]


def summarise(rows: Iterable[Row]) -> Summary:
    """Lay the rows of `examine` out as a table."""
    cells = {(row["feature"], row["backend"]): row for row in rows}
    features, names = (list(dict.fromkeys(pair[index] for pair in cells)) for index in (0, 1))
    shown = [name for name in names if any(cells[feature, name]["status"] != "unsupported" for feature in features)]
    absent: dict[str, list[str]] = {}
    for name in names:
        if name not in shown:
            absent.setdefault(cells[features[0], name]["reason"], []).append(name)
    reasons: dict[str, int] = {}
    lines = []
    for feature in features:
        lines.append([feature])
        for name in shown:
            row = cells[feature, name]
            mark = {"ok": "ok", "forward only": "forward ", "unsupported": ""}[row["status"]]
            number = "" if row["reason"] is None else f"({reasons.setdefault(row['reason'], len(reasons) + 1)})"
            lines[-1].append(mark + number)
    return Summary(shown, lines, list(reasons), [f"{', '.join(who)}: {reason}" for reason, who in absent.items()])


def markdown(rows: Iterable[Row]) -> str:
    """Write the support table as Markdown."""
    header, lines, reasons, absent = summarise(rows)
    table = [["", *(f"`{name}`" for name in header)], ["---"] * (len(header) + 1), *lines]
    parts = ["".join(f"| {' | '.join(line)} |\n" for line in table)]
    if reasons:
        parts.append("\n" + "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1)))
    if absent:
        parts.append("\nNot on this machine:\n\n" + "".join(f"- {sentence}\n" for sentence in absent))
    return "".join(parts)
