"""Which backend can do what, asked of `backends.why_not` alone."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from flashlab.attention import backends
from flashlab.attention.spec import AttentionSpec

Row = dict[str, Any]

# The plain call that every feature changes.
PLAIN = {"batch_size": 2, "seqlen_q": 512, "seqlen_k": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
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
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    **{f"head_dim {head_dim}": {"head_dim": head_dim} for head_dim in (32, 64, 80, 96, 128, 192, 256, 320)},
}


def examine(device: torch.device) -> list[Row]:
    """Ask every backend about every feature on a device, without and with gradients.

    Returns:
        A row for each pair: its status is "ok", "forward only" (no gradients, for the reason given) or "unsupported".
    """
    plain = AttentionSpec(**PLAIN, dtype=torch.bfloat16, device=device)
    return [_ask(name, feature, replace(plain, **FEATURES[feature])) for feature in FEATURES for name in backends.BACKENDS]


def _ask(name: str, feature: str, spec: AttentionSpec) -> Row:
    status, reason = "ok", backends.why_not(name, spec)
    if reason is not None:
        status = "unsupported"
    elif spec.layout != "cache" and (reason := backends.why_not(name, replace(spec, needs_grad=True))) is not None:
        status = "forward only"
    return {"feature": feature, "backend": name, "status": status, "reason": reason}


def summarise(rows: Iterable[Row]) -> tuple[list[list[str]], list[str], list[str]]:
    """Lay the rows out as a table whose cells say "ok", "forward" or nothing, with the number of a reason.

    A backend that supports nothing for one reason has no column.

    Returns:
        The lines of the table, its header first; the reasons, of which the first has number 1; a sentence for each
        backend without a column.
    """
    cells = {(row["feature"], row["backend"]): row for row in rows}
    features, names = (list(dict.fromkeys(pair[index] for pair in cells)) for index in (0, 1))
    absent = {
        name: reasons.pop()
        for name in names
        if len(reasons := {row["reason"] for (_, of), row in cells.items() if of == name}) == 1 and None not in reasons
    }
    shown = [name for name in names if name not in absent]
    reasons: dict[str, int] = {}
    lines = [["", *shown]]
    for feature in features:
        line = [feature]
        for name in shown:
            row = cells[feature, name]
            mark = {"ok": "ok", "forward only": "forward", "unsupported": ""}[row["status"]]
            number = "" if row["reason"] is None else f"({reasons.setdefault(row['reason'], len(reasons) + 1)})"
            line.append(f"{mark} {number}".strip())
        lines.append(line)
    return lines, list(reasons), [f"{name}: {reason}" for name, reason in absent.items()]


def markdown(rows: Iterable[Row]) -> str:
    """Write the support table as Markdown."""
    (header, *lines), reasons, absent = summarise(rows)
    table = [[f"`{name}`" if name else "" for name in header], ["---"] * len(header), *lines]
    parts = ["".join(f"| {' | '.join(line)} |\n" for line in table)]
    parts += ["\n", *(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))] if reasons else []
    parts += ["\nNot here:\n\n", *(f"- {sentence}\n" for sentence in absent)] if absent else []
    return "".join(parts)
