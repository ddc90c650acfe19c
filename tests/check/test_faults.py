"""The check must be able to fail: it finds every deliberate fault in a correct kernel, with its quick cases alone."""

from functools import cache, partial

import pytest
import torch
from model_kernel import Kernel

from flashlab.attention.backends import BACKENDS
from flashlab.check.cases import quick_cases
from flashlab.check.judge import Judge

# Long cases and large heads take most of the time and show no other faults. Kernels on GPUs run float16 and bfloat16
# only, so those cases alone have to show every fault.
CASES = [case for case in quick_cases() if case.lengths != "2048x2048" and case.head_dim <= 128]
HALF = [case for case in CASES if case.dtype != "float32"]
RIGHT = Kernel()


def top_left(step, seqlen_q, seqlen_k):
    return torch.arange(seqlen_q)[:, None] - torch.arange(seqlen_k)


def causal_until(right):
    def visible(step, seqlen_q, seqlen_k, options):
        changes = {"causal": False, "window_size": (options.window_size[0], right)} if options.causal else {}
        return step(seqlen_q, seqlen_k, options._replace(**changes))

    return visible


def window(change):
    def visible(step, seqlen_q, seqlen_k, options):
        return step(seqlen_q, seqlen_k, options._replace(window_size=change(*options.window_size)))

    return visible


def unmasked(step, *arguments):
    *tensors, options = arguments
    return step(*tensors, options._replace(causal=False, window_size=(-1, -1), block_mask=None))


def set_rows(start, value, *, heads=slice(None)):
    """Overwrite some of the output's rows."""

    def write(step, out):
        out = out.clone()
        out[0, start : start + 16, heads] = value
        return out

    return write


def leave_rows(step, out):
    """Write all of the output but its last rows."""
    written = torch.empty_like(out)
    written[:, :-1] = out[:, :-1]
    return written


def noise_in_one_tile(step, out):
    out = out.clone()
    out[-1, :32, 0] *= 1 + 0.003 * torch.rand(())
    return out


def spread_nan(step, out):
    return out + 0 * out.sum(dim=(1, 2, 3), keepdim=True)


def padded(step, out):
    """Compute 64 of 96 columns, as if the head dimension were rounded down."""
    return torch.where(torch.arange(out.shape[-1]) < out.shape[-1] // 64 * 64, out, 0.0) if out.shape[-1] == 96 else out


def jitter(step, dq, dk, dv, options):
    """Sum in another order each time, though asked not to."""
    return dq * (1 + torch.finfo(dq.dtype).eps * torch.randint(0, 2, dq.shape)), dk, dv


def lose_one_addition(step, dq, dk, dv, options):
    """Lose one block's share of dq, as two blocks do that add to it at once."""
    dq = dq.clone()
    dq[0, :16, 0] *= 0.5
    return dq, dk, dv


def leak(step, packing):
    return [((start_q, end_q), (max(start_k - 1, 0), end_k)) for (start_q, end_q), (start_k, end_k) in step(packing)]


def drop_last(step, q, *rest):
    out = step(q, *rest)
    return torch.cat([out[: -(len(out) // 2)], torch.zeros_like(out[-(len(out) // 2) :])])


def write_into_input(step, q, *rest):
    out = step(q, *rest)
    q.data[0] = 0.0
    return out


def append_keys_only(step, k_cache, v_cache, k, v, start):
    k_cache[start : start + len(k)] = k


# What is wrong -> the steps that are replaced; a replacement is given the right step first.
FAULTS = {
    "scale off by 1 %": {"scale": lambda step, options: 1.01 * step(options)},
    "scale off by 1 % in the backward pass": {"gradients": lambda step, dq, dk, dv, options: (dq * 1.01, dk, dv)},
    "scale ignored": {"scale": lambda step, options: 0.125},
    "soft cap ignored": {"cap": lambda step, scores, options: scores, "uncap": lambda step, grad, *_: grad},
    "soft cap after the mask": {
        "cap": lambda step, scores, options: scores,
        "mask": lambda step, scores, options: RIGHT.cap(step(scores, options), options),
    },
    "soft cap's gradient missing": {"uncap": lambda step, grad, *_: grad},
    "ALiBi's sign": {"bias": lambda step, slopes, distance: -step(slopes, distance)},
    "ALiBi aligned top-left": {"bias": lambda step, slopes, distance: step(slopes, distance - distance[0, 0])},
    "ALiBi's slopes of another head": {"bias": lambda step, slopes, distance: step(slopes.roll(1, dims=1), distance)},
    "ALiBi's slopes of another sequence": {"bias": lambda step, slopes, distance: step(slopes.flip(0), distance)},
    "causal mask lets one more key in": {"visible": causal_until(1)},
    "causal mask keeps one more key out": {"visible": causal_until(-1)},
    "causal mask aligned top-left": {"distance": top_left},
    "left window one more": {"visible": window(lambda left, right: (left + (left >= 0), right))},
    "left window one less": {"visible": window(lambda left, right: (left - (left >= 0), right))},
    "left window ignored": {"visible": window(lambda left, right: (-1, right))},
    "right window one more": {"visible": window(lambda left, right: (left, right + (right >= 0)))},
    "right window ignored": {"visible": window(lambda left, right: (left, -1))},
    "block mask transposed": {"blocks": lambda step, mask: mask.T if mask.shape[0] == mask.shape[1] else mask},
    "block mask ignored": {"blocks": lambda step, mask: torch.ones_like(mask)},
    "masks missing in the backward pass": {"backward": unmasked},
    "last tile of keys dropped": {"tiles": lambda step, seqlen_k: step(seqlen_k)[: max(seqlen_k // 32, 1)]},
    "first tile of keys dropped": {"tiles": lambda step, seqlen_k: step(seqlen_k)[seqlen_k > 32 :]},
    "last tile of keys counted twice": {"tiles": lambda step, seqlen_k: [*step(seqlen_k), step(seqlen_k)[-1]]},
    "key/value heads interleaved": {
        "spread": lambda step, x, groups: x.repeat(1, groups, 1, 1),
        "collect": lambda step, x, groups: x.unflatten(1, (groups, -1)).sum(dim=1),
    },
    "one key/value head for all": {"spread": lambda step, x, groups: step(x[:, :1].expand_as(x), groups)},
    "keys of another sequence": {"spread": lambda step, x, groups: step(x.roll(1, dims=0), groups)},
    "sum over the group missing": {"collect": lambda step, x, groups: x.unflatten(1, (-1, groups))[:, :, 0]},
    "dk and dv swapped": {"gradients": lambda step, dq, dk, dv, options: (dq, dv, dk)},
    "dk from dv": {"gradients": lambda step, dq, dk, dv, options: (dq, dv, dv)},
    "dq without the scale": {"gradients": lambda step, dq, dk, dv, options: (dq / options.softmax_scale, dk, dv)},
    "dv from weights that are not normalised": {
        "weights_of_dv": lambda step, weights: weights / weights.amax(dim=-1, keepdim=True).clamp_min(1e-30)
    },
    "delta missing in the backward pass": {"delta": lambda step, grad_out, out: torch.zeros(())},
    "delta of the next query": {"delta": lambda step, grad_out, out: step(grad_out, out).roll(1, dims=2)},
    "sum not rescaled when the maximum grows": {
        "accumulate": lambda step, out, rescale, new: out + new,
    },
    "nothing rescaled when the maximum grows": {"rescale": lambda step, maximum, grown: torch.ones(())},
    "maximum not taken off": {"grow": lambda step, maximum, tile: torch.zeros_like(maximum)},
    "sums in bfloat16": {"accumulate": lambda step, *parts: step(*parts).bfloat16().float()},
    "not normalised": {"normalise": lambda step, out, total: out},
    "blind queries get NaN": {"normalise": lambda step, out, total: out / total},
    "blind queries get the mean of all values": {
        "mask": lambda step, scores, options: step(scores, options).clamp_min(torch.finfo(torch.float32).min)
    },
    "one row of zeros": {"write": lambda step, out: out.index_fill(1, torch.tensor([out.shape[1] // 2]), 0.0)},
    "one tile of one head zero": {"write": set_rows(16, 0.0, heads=-1)},
    "columns beyond 64 dropped": {"write": padded},
    "last rows never written": {"write": leave_rows},
    "noise in one tile": {"write": noise_in_one_tile},
    "two additions to dq at once": {"gradients": lose_one_addition},
    "backward pass not deterministic": {"gradients": jitter},
    "output in float32": {"write": lambda step, out: out.float()},
    "output [B, H, S, D]": {"write": lambda step, out: out.transpose(1, 2)},
    "output [B, H, S, D] in the right shape": {"write": lambda step, out: out.transpose(1, 2).reshape(out.shape)},
    "input overwritten": {"dense": write_into_input},
    "NaN hidden": {"write": lambda step, out: out.nan_to_num()},
    "NaN in all heads": {"write": spread_nan},
    "packed sequences see one key of the one before": {"sequences": leak},
    "last packed sequence dropped": {"packed": drop_last},
    "cache appended one place off": {"append": lambda step, *rest: step(*rest[:-1], rest[-1] - 1 if rest[-1] else 1)},
    "cache appended keys only": {"append": append_keys_only},
    "cache read one place too far": {"filled": lambda step, filled, places: min(filled + 1, places)},
    "cache read to its end": {"filled": lambda step, filled, places: places},
    "newest token of the cache left out": {"filled": lambda step, filled, places: max(filled - 1, 1)},
    "raises": {"scores": lambda step, *_: torch.zeros(2) @ torch.zeros(3)},
}


def plant(faults):
    """Return a kernel with some of its steps replaced."""
    kernel = Kernel()
    for name, wrong in faults.items():
        setattr(kernel, name, partial(wrong, getattr(RIGHT, name)))
    return kernel


@cache
def judge_of(case):
    return Judge(case, torch.device("cpu"))


def verdicts(kernel, cases, monkeypatch):
    monkeypatch.setitem(BACKENDS, "planted", kernel.as_backend())
    return (judge_of(case).judge("planted") for case in cases)


@pytest.fixture(autouse=True)
def one_thread():
    """Keep small operations from waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, monkeypatch):
    torch.manual_seed(0)
    found = next((each for each in verdicts(plant(FAULTS[fault]), HALF, monkeypatch) if each.status == "wrong"), None)
    assert found is not None
    assert found.reason


def test_the_same_kernel_without_a_fault_passes(monkeypatch):
    found = list(verdicts(plant({}), CASES, monkeypatch))
    assert [verdict for verdict in found if verdict.status != "ok"] == []
