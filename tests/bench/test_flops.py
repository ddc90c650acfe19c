import pytest
import torch

from flashlab.attention.reference import visible
from flashlab.attention.spec import Options
from flashlab.bench.flops import flops, visible_share


def test_flops_of_the_papers_table():
    # FlashAttention's benchmark: hidden 2048, 16k tokens; at length 2048 and head dim 64, causal, forward: 275 GFLOP.
    shape = {"batch_size": 8, "seqlen_q": 2048, "seqlen_k": 2048, "num_heads": 32, "head_dim": 64}
    forward = flops("forward", **shape, share=0.5)
    assert forward == 4 * 8 * 2048**2 * 32 * 64 / 2
    assert flops("backward", **shape, share=0.5) == 2.5 * forward
    assert flops("forward_backward", **shape, share=0.5) == 3.5 * forward


@pytest.mark.parametrize("seqlens", [(7, 7), (300, 300), (5, 300), (300, 40)], ids=str)
@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"causal": True, "window_size": (16, 0)},
        {"causal": True, "window_size": (16, 5)},
        {"window_size": (3, 20)},
        {"window_size": (-1, 4)},
        {"window_size": (4, -1)},
    ],
    ids=str,
)
def test_share_is_what_the_reference_lets_through(mask, seqlens):
    seen = visible(*seqlens, Options(1.0, **mask), torch.device("cpu"))
    assert visible_share(*seqlens, **mask) == pytest.approx(1.0 if seen is None else float(seen.double().mean()))


def test_share_of_block_masks_and_of_causal_masks():
    blocks = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
    seen = visible(300, 300, Options(1.0, block_mask=blocks), torch.device("cpu"))
    assert visible_share(300, 300, block_mask=blocks) == pytest.approx(float(seen.double().mean()))
    assert visible_share(300, 300, causal=True) == 0.5
