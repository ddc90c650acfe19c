"""The comparison that stands before every time: right attention passes, attention with one planted fault does not."""

import pytest
import torch

from flashlab.attention import reference
from flashlab.bench import compare as module
from flashlab.bench.case import Case
from flashlab.bench.compare import compare


def case_of(**changes):
    shape = {"batch_size": 2, "seqlen": 200, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    return Case(**shape | {"dtype": "float32", "mask": "causal", "device": "cpu"} | changes)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    module._judge.cache_clear()


def standard(case):
    return lambda q, k, v: reference.attention(q, k, v, case.options())


@pytest.mark.parametrize("mask", ["full", "causal", "window:40", "blocks:0.5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_attention_passes(mask, dtype):
    case = case_of(mask=mask, dtype=dtype)
    verdict = compare(case, standard(case), needs_grad=True)
    assert verdict.wrong is None
    assert 0 < verdict.error_ratio < 1


class Swapped(torch.autograd.Function):
    """Hands k the gradient of v, and v that of k."""

    @staticmethod
    def forward(ctx, k, v):
        return k.clone(), v.clone()

    @staticmethod
    def backward(ctx, dk, dv):
        return dv, dk


def scale_off(case, q, k, v):
    return reference.attention(1.01 * q, k, v, case.options())


def mask_off_by_one(case, q, k, v):
    options = case.options()._replace(causal=False, window_size=(-1, 1))
    return reference.attention(q, k, v, options)


def last_head_noisy(case, q, k, v):
    out = standard(case)(q, k, v)
    return torch.cat([out[:, :, :-1], 1.001 * out[:, :, -1:]], dim=2)


def last_batch_entry_from_the_first(case, q, k, v):
    return standard(case)(q[[0, 0]], k[[0, 0]], v[[0, 0]])


def heads_mapped_wrongly(case, q, k, v):
    return reference.attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), case.options())


def dk_from_dv(case, q, k, v):
    return standard(case)(q, *Swapped.apply(k, v))


def one_nan(case, q, k, v):
    out = standard(case)(q, k, v)
    return out.where(torch.arange(out.numel()).view_as(out) != 5000, torch.nan)


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        (scale_off, "out"),
        (mask_off_by_one, "out"),
        (last_head_noisy, "out"),
        (last_batch_entry_from_the_first, "dq"),
        (heads_mapped_wrongly, "out"),
        (dk_from_dv, "dk"),
        (one_nan, "out"),
    ],
)
def test_a_fault_is_found_and_named(fault, tensor):
    case = case_of()
    verdict = compare(case, lambda q, k, v: fault(case, q, k, v), needs_grad=True)
    assert verdict.wrong.startswith(tensor)


@pytest.mark.parametrize("mask", ["full", "causal", "window:40", "window:300", "blocks:0.4"])
def test_blocks_of_queries_give_what_all_queries_give(mask, monkeypatch):
    case = case_of(mask=mask, seqlen=700)
    inputs = module._Inputs(*(x.double() for x in case.inputs()))
    whole = module._standard(inputs, case.options(), True)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    for got, expected in zip(module._standard(inputs, case.options(), True), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
