"""The judgement of one case: run a backend and compare what it gives with the oracle.

What standard attention is off by in the precision of the inputs is the yardstick; no tolerance is chosen by hand. Two
rules, and a result must keep both:

1. flash-attn's: the largest error is at most twice the largest error of standard attention, plus rounding
   (`flashlab.attention.reference.allowed_error`).
2. The same with root mean squares, in each block of 128 or more rows of one head by itself. The largest error of all
   stands where values are largest, in the first rows of a causal mask, and hides a wrong tile further down. A mean
   over a block is nearly the same for any two correct implementations: twice leaves little room for faults.
"""

from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlab.attention import (
    BackendUnavailable,
    attention,
    attention_packed,
    attention_with_kvcache,
    reference,
    resolve,
)
from flashlab.check import oracle
from flashlab.check.cases import Case, Inputs, describe, make_inputs, spoiled_outputs
from flashlab.check.oracle import Results
from flashlab.errors import is_out_of_memory, one_line

BLOCK_ROWS = 128
SMALLEST = 1e-30  # where a query sees nothing nothing is allowed, and ratios stay finite


class Errors(NamedTuple):
    """What a backend and standard attention are off by, in one output or gradient.

    Attributes:
        error: The backend's largest error.
        standard_error: Standard attention's in the same precision.
        allowed: The largest error that rule 1 allows.
        mean_ratio: The mean error over what rule 2 allows, in the worst block; 0 where it does not apply.
    """

    error: float
    standard_error: float
    allowed: float
    mean_ratio: float


class Verdict(NamedTuple):
    """How one backend did in one case.

    Attributes:
        status: "ok", "unsupported", "wrong" or "oom".
        reason: Why it is not ok: what is wrong, and where. For "ok": why it was judged without gradients.
        errors: By output and gradient.
    """

    status: str
    reason: str | None
    errors: dict[str, Errors]


class Judge:
    """Judge backends by one case, whose inputs, exact and standard results are computed once."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.inputs = clean = make_inputs(case, device)
        self.spec = describe(case, device)
        self.needs_grad = case.needs_grad
        if case.values in ("nan", "nan_value"):  # what this spoils is known, and is no matter of how the oracle masks
            clean = clean._replace(q=clean.q.nan_to_num(), k=clean.k.nan_to_num(), v=clean.v.nan_to_num())
        self.standard = oracle.standard_attention(clean, case.needs_grad)
        in_float64 = clean.to(torch.float64)
        self.exact = oracle.standard_attention(in_float64, case.needs_grad)
        self.rounding = oracle.rounding(in_float64, case.needs_grad)
        self.excused = self.exact["out"].isnan()  # the softmax of an infinite score has no value
        if case.values in ("nan", "nan_value", "inf"):
            must_be_nan, may_be_nan = spoiled_outputs(case, clean.options, device)
            self.excused |= may_be_nan
            self.exact["out"].masked_fill_(must_be_nan, torch.nan)
        self.rows = min(case.seqlens)
        self.judged_blocks = _judged_blocks(case, clean)

    def judge(self, backend: str) -> Verdict:
        """Run a backend on the case and compare; forward only where it has no backward pass."""
        verdict = self._judge(backend, with_grad=not self.is_cache)
        if verdict.status == "unsupported" and not self.is_cache:
            forward = self._judge(backend, with_grad=False)
            if forward.status != "unsupported":
                return forward._replace(reason=forward.reason or f"forward only: {verdict.reason}")
        return verdict

    @property
    def is_cache(self) -> bool:
        return self.inputs.layout in ("append", "read")

    def _judge(self, backend: str, with_grad: bool) -> Verdict:
        errors: dict[str, Errors] = {}
        try:
            resolve(backend, replace(self.spec, needs_grad=with_grad))  # a call does not say what its inputs hold
            problems = self._run_and_compare(backend, with_grad, errors)
        except BackendUnavailable as unavailable:
            return Verdict("unsupported", str(unavailable).split("cannot run this call: ")[-1], {})
        except Exception as error:  # whatever a kernel raises is a finding about it, and the other cases go on
            if is_out_of_memory(error):
                return Verdict("oom", one_line(error), {})
            return Verdict("wrong", f"raised {one_line(error)}", errors)
        return Verdict("wrong", problems[0], errors) if problems else Verdict("ok", None, errors)

    def _run_and_compare(self, backend: str, with_grad: bool, errors: dict[str, Errors]) -> list[str]:
        """Say what is wrong, and fill in the errors of out, dq, dk and dv."""
        inputs, needs_grad = self.inputs, self.needs_grad and with_grad
        _poison(self.standard)
        got = _run(backend, inputs, with_grad, needs_grad)
        again = _run(backend, inputs, with_grad, needs_grad and inputs.options.deterministic)
        problems = []
        for name, standard in self.standard.items():
            if name not in got:  # gradients of a backend that has only a forward pass
                continue
            if (is_ := _describe(got[name])) != (should_be := _describe(standard)):
                problems.append(f"{name} is {is_}, should be {should_be}")
            elif name in ("k_cache", "v_cache"):
                problems += _differences(f"{name} after the call", got[name], standard)
            else:
                excused = self.excused if name == "out" else torch.zeros_like(standard, dtype=torch.bool)
                judged_blocks = self.judged_blocks[name in ("dk", "dv")]
                errors[name], wrong = compare(
                    got[name], standard, self.exact[name], self.rounding[name], excused, self.rows, judged_blocks
                )
                problems += [f"{name}{problem}" for problem in wrong]
                if name in again:
                    problems += _differences(f"{name} when repeated", again[name], got[name])
        for name in "q" if self.is_cache else "qkv":
            problems += _differences(f"the input {name} after the call", got[f"input {name}"], getattr(inputs, name))
        return problems


def compare(
    got: Tensor,
    standard: Tensor,
    exact: Tensor,
    rounding: Tensor,
    excused: Tensor,
    rows: int,
    judged_blocks: Tensor,
) -> tuple[Errors, list[str]]:
    """Compare a result with the exact one by both rules.

    Args:
        got: The backend's, ``[B, S, H, D]`` or packed ``[T, H, D]``.
        standard: Standard attention's in the same precision.
        exact: Standard attention's in float64; what is not finite there must not be finite in `got`.
        rounding: What rounding in float32 does, from `oracle.rounding`.
        excused: bool: where `got` may be finite or not. It need not be finite where standard attention overflows.
        rows: The number of queries or keys, whichever is smaller.
        judged_blocks: bool ``[N]``: the blocks that rule 2 is for.

    Returns:
        The errors, and what is wrong: the place, what was got and expected, and by how much it is off.
    """
    got64, problems = got.double(), []
    for bad, words in (
        (~got64.isfinite() & exact.isfinite() & standard.isfinite() & ~excused, "should be finite"),
        (got64.isfinite() & ~exact.isfinite() & ~excused, "should not be finite: NaN and infinity must not be hidden"),
    ):
        if bad.any():
            place = bad.nonzero()[0].tolist()
            problems.append(f"{place} is {got64[*place]:.6g}, {words} ({int(bad.sum())} such of {bad.numel()})")
    error = (got64 - exact).abs().where(got64.isfinite() & exact.isfinite(), 0.0)
    exact = exact.nan_to_num(0.0, 0.0, 0.0)
    rounding = rounding.nan_to_num(0.0, 0.0, 0.0)
    standard = standard.where(standard.isfinite(), exact.to(standard.dtype))
    standard_error = (standard.double() - exact).abs()

    allowed = reference.allowed_error(standard, exact, float(rounding.max()))
    if error.max() > allowed:
        place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        problems.append(
            f"{place} is {got64[*place]:.6g}, should be {exact[*place]:.6g}: off by {error.max():.3g}, "
            f"allowed {allowed:.3g} (standard attention {standard_error.max():.3g})"
        )
    rms, standard_rms, exact_rms, rounding_rms = (_block_rms(x, rows) for x in (error, standard_error, exact, rounding))
    half_a_step, eps32 = torch.finfo(standard.dtype).eps / 2, torch.finfo(torch.float32).eps
    allowed_rms = 2 * standard_rms + half_a_step * exact_rms + eps32 * rounding_rms
    ratio = rms / allowed_rms.clamp_min(SMALLEST) * judged_blocks[:, None, None]
    if ratio.max() > 1:
        block = [int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape)]
        problems.append(
            f"{_block_name(got.shape, rows, *block)} is off by {rms[*block]:.3g} in the mean (RMS), allowed "
            f"{allowed_rms[*block]:.3g} (standard attention {standard_rms[*block]:.3g})"
        )
    return Errors(float(error.max()), float(standard_error.max()), allowed, float(ratio.max())), problems


def _block_rms(x: Tensor, rows: int) -> Tensor:
    """Return the root mean square of blocks of rows, by block, sequence and head ``[N, B, H]``.

    Where there are fewer rows than a block has, those of all sequences and heads are one block ``[1, 1, 1]``.
    """
    squares = (x if x.dim() == 4 else x[None]).square().mean(dim=-1)
    if rows < BLOCK_ROWS:
        return squares.mean().sqrt().reshape(1, 1, 1)
    blocks = squares.tensor_split(squares.shape[1] // BLOCK_ROWS, dim=1)
    return torch.stack([block.mean(dim=1) for block in blocks]).sqrt()


def _judged_blocks(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Choose the blocks that rule 2 is for: bool ``[N]`` for queries, and for keys.

    The rows of a block must err independently, or their mean is chance: dk and dv of many keys that one query sees err
    as that query's weights do. So as many queries have to see the keys of a block as it has rows, and as many keys have
    to be seen by its queries.
    """
    device, rows = inputs.q.device, min(case.seqlens)
    if rows < BLOCK_ROWS:
        enough = torch.tensor([len(inputs.seqlens_q) * rows * case.num_heads[0] >= BLOCK_ROWS], device=device)
        return enough, enough
    if inputs.layout != "dense":
        return torch.ones(1, dtype=torch.bool, device=device), torch.ones(1, dtype=torch.bool, device=device)
    sees = reference.visible(*case.seqlens, inputs.options, device)
    sees = torch.ones(case.seqlens, dtype=torch.bool, device=device) if sees is None else sees
    by_queries, by_keys = (
        [min(block.any(dim=0).sum(), block.any(dim=1).sum()) for block in x.tensor_split(len(x) // BLOCK_ROWS)]
        for x in (sees, sees.T)
    )
    return torch.stack(by_queries) >= BLOCK_ROWS, torch.stack(by_keys) >= BLOCK_ROWS


def _block_name(shape: torch.Size, rows: int, n: int, b: int, h: int) -> str:
    """Write a block as an index."""
    if rows < BLOCK_ROWS:
        return ""
    seqlen = shape[-3]
    block = torch.arange(seqlen).tensor_split(seqlen // BLOCK_ROWS)[n].tolist()
    batch = f"{b}, " if len(shape) == 4 else ""
    return f"[{batch}{block[0]}:{block[-1] + 1}, {h}]"


def _run(backend: str, inputs: Inputs, with_grad: bool, needs_grad: bool) -> Results:
    """Run a backend through the interface; the inputs as they are afterwards come back too.

    Args:
        backend: Its name.
        inputs: What it is given.
        with_grad: Run the forward pass as in training, also where no gradients are asked for: kernels that compile then
            need one form less.
        needs_grad: Run the backward pass.
    """
    options, device = inputs.options, inputs.q.device
    q, k, v = leaves = [x.detach().clone().requires_grad_(with_grad) for x in (inputs.q, inputs.k, inputs.v)]
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
        lens_q, lens_k = inputs.seqlens_q, inputs.seqlens_k
        ends_q, ends_k = (
            torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device) for lens in (lens_q, lens_k)
        )
        keywords["deterministic"] = options.deterministic
        out = attention_packed(q, k, v, ends_q, ends_k, max(lens_q), max(lens_k), **keywords)
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
