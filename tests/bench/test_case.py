import pytest
import torch

from flashlab.bench.case import Case, block_mask
from flashlab.errors import UserError


@pytest.mark.parametrize(
    ("seqlen", "share", "kept"), [(1024, 0.25, 16), (1024, 1.0, 64), (1024, 0.01, 8), (100, 0.5, 1)]
)
def test_block_mask_keeps_the_diagonal_and_as_many_blocks_as_asked_for(seqlen, share, kept):
    mask = block_mask(seqlen, share)
    assert mask.diagonal().all()
    assert int(mask.sum()) == kept
    assert torch.equal(mask, block_mask(seqlen, share))


def test_a_smaller_share_is_a_part_of_a_larger_one():
    assert not (block_mask(2048, 0.2) & ~block_mask(2048, 0.6)).any()


def test_inputs_are_the_same_each_time_and_as_large_as_said():
    case = Case(2, 33, 4, 2, 16, "bfloat16", "causal", "cpu")
    first, second = case.inputs(), case.inputs()
    assert all(map(torch.equal, first, second))
    assert case.input_bytes(with_grad_out=True) == sum(x.nbytes for x in first)
    assert case.input_bytes(with_grad_out=False) == sum(x.nbytes for x in first[:3])
    assert [tuple(x.shape) for x in first] == [(2, 33, 4, 16), (2, 33, 2, 16), (2, 33, 2, 16), (2, 33, 4, 16)]


@pytest.mark.parametrize("mask", ["casual", "window", "window:-1", "blocks:0", "blocks:1.5", "blocks:x", ""])
def test_a_mask_that_means_nothing_is_an_error(mask):
    with pytest.raises(UserError, match="there are: full, causal"):
        Case(1, 8, 1, 1, 8, "float32", mask, "cpu").mask_arguments()
