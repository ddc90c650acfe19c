"""The judgement of one case: run a backend and compare what it gives with float64 standard attention.

What standard attention is off by in the precision of the inputs is the yardstick; no tolerance is chosen by hand. Two
rules, and a result must keep both:

1. flash-attn's: the largest error is at most twice the largest error of standard attention, plus rounding
   (`flashlab.attention.reference.allowed_error`).
2. The same with root mean squares, in each block of 128 or more rows of one head by itself. The largest error of all
   stands where values are largest, and a wrong tile among small values hides under it. A mean over a block is nearly
   the same for any two correct implementations, so twice that of standard attention leaves little room for more.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlab.attention import BackendUnavailable, attention, attention_packed, attention_with_kvcache, reference
from flashlab.check.cases import Case, Inputs, make_inputs, spoiled_outputs

BLOCK_ROWS = 128
Results = dict[str, Tensor]


class Errors(NamedTuple):
    """What a backend and standard attention are off by, in one output or gradient.

    Attributes:
        error: The backend's largest error.
        standard_error: Standard attention's in the same precision.
        allowed: The largest error that rule 1 allows.
        mean_ratio: The mean error over what rule 2 allows, in the worst block.
    """

    error: float
    standard_error: float
    allowed: float
    mean_ratio: float


class Verdict(NamedTuple):
    """How one backend did in one case.

    Attributes:
        status: "ok", "unsupported", "wrong" or "oom".
        reason: Why it is not ok: what is wrong, and where.
        errors: By output and gradient.
    """

    status: str
    reason: str | None
    errors: dict[str, Errors]


class Judge:
    """Judge backends by one case, whose inputs, exact and standard results are computed once."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.inputs = clean = make_inputs(case, device)
        self.needs_grad = case.needs_grad
        if case.values in ("nan", "nan_value"):  # what this spoils is known, and is no matter of how the oracle masks
            clean = clean._replace(q=clean.q.nan_to_num(), k=clean.k.nan_to_num(), v=clean.v.nan_to_num())
        self.exact = _reference(clean.to(torch.float64), case.needs_grad)
        self.standard = _reference(clean, case.needs_grad)
        self.standard.pop("weights_of_keys", None)
        self.excused = self.exact["out"].isnan()  # the softmax of an infinite score has no value
        if case.values in ("nan", "nan_value", "inf"):
            must_be_nan, may_be_nan = spoiled_outputs(case, clean.options, device)
            self.excused |= may_be_nan
            self.exact["out"].masked_fill_(must_be_nan, torch.nan)
        self.largest_terms = _largest_terms(clean, self.exact.pop("weights_of_keys", None))
        self.rows = min(case.seqlens)

    def judge(self, backend: str) -> Verdict:
        """Run a backend on the case and compare."""
        errors: dict[str, Errors] = {}
        try:
            problems = self._run_and_compare(backend, errors)
        except BackendUnavailable as unavailable:
            return Verdict("unsupported", str(unavailable).split("cannot run this call: ")[-1], {})
        except torch.OutOfMemoryError as error:
            return Verdict("oom", _one_line(error), {})
        except Exception as error:  # whatever a kernel raises is a finding about it, and the other cases go on
            if "can't allocate memory" in str(error):  # the CPU's words
                return Verdict("oom", _one_line(error), {})
            return Verdict("wrong", f"raised {type(error).__name__}: {_one_line(error)}", errors)
        return Verdict("wrong", problems[0], errors) if problems else Verdict("ok", None, errors)

    def _run_and_compare(self, backend: str, errors: dict[str, Errors]) -> list[str]:
        """Say what is wrong, and fill in the errors of out, dq, dk and dv."""
        _poison(self.standard)
        got = _run(backend, self.inputs, self.needs_grad)
        again = _run(backend, self.inputs, self.needs_grad and self.inputs.options.deterministic)
        problems = []
        for name, standard in self.standard.items():
            if (is_ := _describe(got[name])) != (should_be := _describe(standard)):
                problems.append(f"{name} is {is_}, should be {should_be}")
            elif name in ("k_cache", "v_cache"):
                problems += _differences(f"{name} after the call", got[name], standard)
            else:
                excused = self.excused if name == "out" else torch.zeros_like(standard, dtype=torch.bool)
                judged = (got[name], standard, self.exact[name], excused, self.largest_terms[name], self.rows)
                errors[name], wrong = compare(*judged)
                problems += [f"{name}{problem}" for problem in wrong]
                if name in again:
                    problems += _differences(f"{name} when repeated", again[name], got[name])
        for name in "qkv" if self.inputs.new is None else "q":
            before = getattr(self.inputs, name)
            problems += _differences(f"the input {name} after the call", got[f"input {name}"], before)
        return problems


def compare(
    got: Tensor, standard: Tensor, exact: Tensor, excused: Tensor, largest_term: float, rows: int
) -> tuple[Errors, list[str]]:
    """Compare a result with the exact one by both rules.

    Args:
        got: The backend's, ``[B, S, H, D]`` or packed ``[T, H, D]``.
        standard: Standard attention's in the same precision.
        exact: Standard attention's in float64; what is not finite there must not be finite in `got`.
        excused: bool: where `got` may be finite or not. It need not be finite where standard attention overflows.
        largest_term: What float32 rounds, in the units of the result (`_largest_terms`).
        rows: The number of queries or of keys, whichever is smaller: how many rows err independently.

    Returns:
        The errors, and what is wrong: the place, what was got and expected, and by how much it is off.
    """
    got64, standard64, problems = got.double(), standard.double(), []
    for bad, words in (
        (~got64.isfinite() & exact.isfinite() & standard64.isfinite() & ~excused, "should be finite"),
        (got64.isfinite() & ~exact.isfinite() & ~excused, "should not be finite: NaN and infinity must not be hidden"),
    ):
        if bad.any():
            place = bad.nonzero()[0].tolist()
            problems.append(f"{place} is {got64[*place]:.6g}, {words} ({int(bad.sum())} such of {bad.numel()})")
    finite = got64.isfinite() & exact.isfinite()
    error = (got64 - exact).abs().where(finite, 0.0)
    exact = exact.nan_to_num(0.0, 0.0, 0.0)
    standard = standard.where(standard.isfinite(), exact.to(standard.dtype))
    standard_error = (standard.double() - exact).abs()
    allowed = reference.allowed_error(standard, exact, largest_term)
    if error.max() > allowed:
        place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        problems.append(
            f"{place} is {got64[*place]:.6g}, should be {exact[*place]:.6g}: off by {error.max():.3g}, "
            f"allowed {allowed:.3g} (standard attention {standard_error.max():.3g})"
        )
    errors = Errors(float(error.max()), float(standard_error.max()), allowed, 0.0)
    rms, standard_rms, exact_rms = (_block_rms(x, rows) for x in (error, standard_error, exact))
    eps, eps32 = torch.finfo(standard.dtype).eps, torch.finfo(torch.float32).eps
    allowed_rms = 2 * standard_rms + eps * exact_rms + eps32 * largest_term
    ratio = rms / allowed_rms
    if ratio.numel() == 0:
        return errors, problems
    if ratio.max() > 1:
        block = [int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)]
        problems.append(
            f"{_block_name(got.shape, rows, *block)} is off by {rms[*block]:.3g} in the mean (RMS), allowed "
            f"{allowed_rms[*block]:.3g} (standard attention {standard_rms[*block]:.3g})"
        )
    return errors._replace(mean_ratio=float(ratio.max())), problems


def _block_rms(x: Tensor, rows: int) -> Tensor:
    """Return the root mean square of blocks of rows.

    Returns:
        By block, sequence and head ``[N, B, H]``. Where there are fewer rows than a block has, those of all heads are
        one block ``[1, 1, 1]``; if they are still fewer there is none ``[0, 1, 1]``, since their mean would be chance.
    """
    squares = (x if x.dim() == 4 else x[None]).square().mean(dim=-1)
    batch_size, seqlen, num_heads = squares.shape
    if rows < BLOCK_ROWS:
        enough = batch_size * rows * num_heads >= BLOCK_ROWS
        return squares.mean().sqrt().reshape(1, 1, 1)[: int(enough)]
    blocks = squares.tensor_split(seqlen // BLOCK_ROWS, dim=1)
    return torch.stack([block.mean(dim=1) for block in blocks]).sqrt()


def _block_name(shape: torch.Size, rows: int, n: int, b: int, h: int) -> str:
    """Write a block as an index."""
    if rows < BLOCK_ROWS:
        return ""
    seqlen = shape[-3]
    block = torch.arange(seqlen).tensor_split(seqlen // BLOCK_ROWS)[n].tolist()
    batch = f"{b}, " if len(shape) == 4 else ""
    return f"[{batch}{block[0]}:{block[-1] + 1}, {h}]"


def _largest_terms(inputs: Inputs, weights_of_keys: Tensor | None) -> dict[str, float]:
    """Bound how far a relative error of one in the largest score, or entry of grad_out v^T, moves each result.

    Kernels compute both in float32. What is rounded there is multiplied by v, k, q or grad_out and summed by weights: a
    query's weights sum to 1, those of a key to what is given.
    """
    scale = inputs.options.softmax_scale
    keys, values = zip((inputs.k, inputs.v), *(() if inputs.new is None else (inputs.new,)), strict=True)
    score = scale * _longest(inputs.q) * max(map(_longest, keys))
    terms = {"out": score * max(map(_largest, values))}
    if weights_of_keys is not None:
        grad_weight, weight = _longest(inputs.grad_out) * _longest(inputs.v), _largest(weights_of_keys)
        terms["dq"] = scale * grad_weight * _largest(inputs.k)
        terms["dk"] = scale * grad_weight * _largest(inputs.q) * weight
        terms["dv"] = score * _largest(inputs.grad_out) * weight
    return terms


def _reference(inputs: Inputs, needs_grad: bool) -> Results:
    """Run standard attention, one sequence at a time: the oracle shares nothing with packed and cached forms."""
    q, k, v = leaves = [x.detach().clone().requires_grad_(needs_grad) for x in (inputs.q, inputs.k, inputs.v)]
    results: Results = {}
    if inputs.layout == "dense":
        out = reference.attention(q, k, v, inputs.options)
    elif inputs.layout == "packed":
        parts = zip(q.split(inputs.seqlens_q), k.split(inputs.seqlens_k), v.split(inputs.seqlens_k), strict=True)
        out = torch.cat([reference.attention(*(x[None] for x in part), inputs.options)[0] for part in parts])
    else:
        outs = []
        for b, filled in enumerate(inputs.seqlens_k):
            if inputs.new is not None:
                start, filled = filled, filled + inputs.new[0].shape[1]
                k[b, start:filled], v[b, start:filled] = inputs.new[0][b], inputs.new[1][b]
            outs.append(reference.attention(q[b, None], k[b, None, :filled], v[b, None, :filled], inputs.options))
        out = torch.cat(outs)
        results = {"k_cache": k, "v_cache": v}
    results["out"] = out.detach()
    if needs_grad:
        grads = torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)
        results |= zip(("dq", "dk", "dv"), grads, strict=True)
        (results["weights_of_keys"],) = torch.autograd.grad(out, v, torch.ones_like(out))  # their sums over queries
    return results


def _run(backend: str, inputs: Inputs, needs_grad: bool) -> Results:
    """Run a backend through the interface; the inputs as they are afterwards come back too."""
    options, device = inputs.options, inputs.q.device
    is_cache = inputs.layout in ("append", "read")
    # With gradients on also where none are asked for: kernels that compile need one form less.
    q, k, v = leaves = [x.detach().clone().requires_grad_(not is_cache) for x in (inputs.q, inputs.k, inputs.v)]
    keywords: dict[str, Any] = {
        "backend": backend,
        "causal": options.causal,
        "softmax_scale": options.softmax_scale,
        "window_size": options.window_size,
        "softcap": options.softcap,
        "alibi_slopes": options.alibi_slopes,
    }
    results: Results = {}
    if inputs.layout == "dense":
        keywords |= {"block_mask": options.block_mask, "deterministic": options.deterministic}
        out = attention(q, k, v, **keywords)
    elif inputs.layout == "packed":
        lengths = inputs.seqlens_q, inputs.seqlens_k
        ends = [torch.tensor([0, *accumulate(each)], dtype=torch.int32, device=device) for each in lengths]
        keywords["deterministic"] = options.deterministic
        out = attention_packed(q, k, v, *ends, *map(max, lengths), **keywords)
    else:
        filled = torch.tensor(inputs.seqlens_k, dtype=torch.int32, device=device)
        new_k, new_v = inputs.new or (None, None)
        out = attention_with_kvcache(q, k, v, filled, k=new_k, v=new_v, **keywords)
        results = {"k_cache": k, "v_cache": v}
    results["out"] = out.detach()
    if needs_grad:
        results |= zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, inputs.grad_out), strict=True)
    return results | {f"input {name}": x.detach() for name, x in zip("qkv", leaves, strict=True)}


def _poison(results: Results) -> None:
    """Leave NaN in memory of the sizes that results take, so that what a kernel never writes shows."""
    [torch.full_like(x, torch.nan) for x in results.values() for _ in range(2)]


def _differences(words: str, got: Tensor, expected: Tensor) -> list[str]:
    """Compare bit by bit, NaN too."""
    if torch.equal(_bits(got), _bits(expected)):
        return []
    place = (_bits(got) != _bits(expected)).nonzero()[0].tolist()
    return [f"{words}: {place} is {float(got[*place]):.6g}, not {float(expected[*place]):.6g}"]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}".removeprefix("torch.")


def _longest(x: Tensor) -> float:
    """Return the length of the longest row that is a number."""
    return float(x.double().norm(dim=-1).nan_to_num(0.0, 0.0, 0.0).max())


def _largest(x: Tensor) -> float:
    return float(x.double().nan_to_num(0.0, 0.0, 0.0).abs().max())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
