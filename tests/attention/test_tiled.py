"""What is particular to tiles: any size of them, what is skipped, what is kept in memory, and the count of bytes."""

from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashlab.attention import reference, tiled
from flashlab.attention.spec import Cache, Options, Packing
from flashlab.attention.traffic import bytes_moved

ALL = {"softmax_scale": 0.3, "window_size": (20, 9), "softcap": 2.0}
# (seqlen_q, seqlen_k, num_heads, num_kv_heads, options)
CASES = {
    "full": (70, 37, 2, 2, {}),
    "causal, more keys": (37, 70, 2, 1, {"causal": True}),
    "causal, more queries": (70, 37, 2, 2, {"causal": True}),
    "window": (70, 70, 4, 2, {"window_size": (3, 0)}),
    "window, some queries see nothing": (90, 20, 2, 2, {"window_size": (5, 40)}),
    "all at once": (65, 90, 4, 2, ALL | {"alibi_slopes": torch.tensor([[0.5, 0.1, 0.0, 2.0], [1.0, 0.3, 0.2, 0.1]])}),
    "one key": (9, 1, 2, 2, {}),
    "scores in the thousands": (70, 70, 2, 2, {"softmax_scale": 100.0}),
    "block mask": (200, 270, 2, 1, {"block_mask": torch.tensor([[1, 0, 1], [0, 0, 0]]) > 0}),
    "block mask, causal": (270, 260, 2, 2, {"block_mask": torch.eye(3) > 0, "causal": True, "softcap": 5.0}),
}


def make(seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim=32, dtype=torch.float32, device="cpu", batch_size=2):
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch_size, n, h, head_dim) for n, h in ((seqlen_q, num_heads), *[(seqlen_k, num_kv_heads)] * 2)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in (*shapes, shapes[0])]


def make_options(device="cpu", **options):
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return Options(**{"softmax_scale": 0.2} | options)


def run(attention, q, k, v, grad_out, *arguments):
    """Return out, dq, dk and dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, *arguments)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("on_chip_bytes", [8_000, tiled.ON_CHIP_BYTES])
@pytest.mark.parametrize("case", CASES)
def test_tiles_of_any_size_give_the_same_attention(case, on_chip_bytes, dtype, device):
    *shape, options = CASES[case]
    tensors, options = make(*shape, dtype=dtype, device=device), make_options(device, **options)
    got = run(tiled.attention, *tensors, options, on_chip_bytes)
    standard = run(reference.attention, *tensors, options)
    exact = run(reference.attention, *(x.double() for x in tensors), options)
    q, k, v, grad_out = (float(x.norm(dim=-1).max()) for x in tensors)
    largest_product = max(options.softmax_scale * q * k, grad_out * v)
    for name, x, low, ref in zip(("out", "dq", "dk", "dv"), got, standard, exact, strict=True):
        error, allowed = float((x.double() - ref).abs().max()), reference.allowed_error(low, ref, largest_product)
        assert x.dtype == dtype
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"softcap": 0.7, "window_size": (3, 2), "alibi_slopes": torch.tensor([0.5, 0.1])}]
)
def test_gradients_are_the_slopes_of_the_output(options):
    q, k, v, _ = (x.requires_grad_() for x in make(7, 9, 2, 1, head_dim=3, dtype=torch.float64, batch_size=1))
    torch.autograd.gradcheck(lambda q, k, v: tiled.attention(q, k, v, make_options(**options), 200), (q, k, v))


def test_a_second_derivative_is_refused_not_wrong():
    q, k, v, _ = (x.requires_grad_() for x in make(7, 9, 2, 2))
    (dq,) = torch.autograd.grad(tiled.attention(q, k, v, make_options()).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        dq.sum().backward()


def test_slopes_differ_by_sequence_in_a_packed_batch_and_in_a_cache():
    q, k, v, _ = make(11, 30, 2, 1, batch_size=3)
    options = make_options(causal=True, alibi_slopes=torch.tensor([[0.5, 0.1], [2.0, 0.0], [0.2, 1.0]]))
    ends_q, ends_k = torch.tensor([0, 4, 4, 11]), torch.tensor([0, 3, 20, 30])
    packed = (q[0], k[0], v[0], Packing(ends_q, ends_k, 7, 17), options)
    assert torch.allclose(tiled.attention_packed(*packed), reference.attention_packed(*packed), atol=1e-5)

    cache = Cache(torch.tensor([3, 0, 20]), k[:, -4:], v[:, -4:])
    caches = [[x.clone() for x in (k, v)] for _ in range(2)]
    got = tiled.attention_with_kvcache(q[:, :4], *caches[0], cache, options)
    expected = reference.attention_with_kvcache(q[:, :4], *caches[1], cache, options)
    assert torch.allclose(got, expected, atol=1e-5)
    assert all(torch.equal(mine, its) for mine, its in zip(*caches, strict=True))


@pytest.mark.parametrize("backward", [False, True])
def test_autocast_does_not_round_the_tiles(backward):
    tensors = make(40, 40, 2, 2)
    exact = run(tiled.attention, *tensors, make_options())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(
            torch.equal(x, y) for x, y in zip(run(tiled.attention, *tensors, make_options()), exact, strict=True)
        )


def test_compiles_into_one_graph_with_a_block_mask():
    torch._dynamo.reset()
    compiled = torch.compile(tiled.attention, fullgraph=True, backend="aot_eager")
    tensors = make(130, 130, 2, 1, dtype=torch.bfloat16)
    for blocks in ([[1, 0], [1, 1]], [[0, 1], [0, 0]]):  # a graph must not remember the first
        options = make_options(block_mask=torch.tensor(blocks) > 0, causal=True)
        for x, y in zip(run(compiled, *tensors, options), run(tiled.attention, *tensors, options), strict=True):
            assert torch.allclose(x, y, atol=1e-5)


def test_refuses_what_torch_cannot_compute_with(make_spec):
    assert tiled.why_not(make_spec()) is None
    assert tiled.why_not(make_spec(dtype=torch.float8_e4m3fn)) == (
        "it computes in float16, bfloat16, float32 or float64; the inputs are float8_e4m3fn"
    )


class Largest(TorchDispatchMode):
    """Watch the size of everything that is computed."""

    numel = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **keywords or {})
        made = [x for x in (result if isinstance(result, list | tuple) else [result]) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in made)])
        return result


def test_memory_is_linear_in_the_length():
    options = make_options(causal=True, window_size=(700, -1), alibi_slopes=torch.tensor([0.5, 0.1]))
    largest, kept = {}, {}
    for seqlen in (512, 1024):
        tensors = make(seqlen, seqlen, 2, 2, batch_size=1)
        saved = []
        with Largest() as largest[seqlen], torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            q, k, v = (x.requires_grad_() for x in tensors[:3])
            tiled.attention(q, k, v, options)
        kept[seqlen] = sum(x.numel() for x in saved)
        with largest[seqlen]:
            run(tiled.attention, *tensors, options)
        assert largest[seqlen].numel == prod(tensors[0].shape)  # q, far from the 2 x S x S scores
        assert kept[seqlen] == 4 * prod(tensors[0].shape) + 2 * 2 * seqlen  # q, k, v, out; two numbers a query


def test_block_sizes_are_the_papers_rounded_to_powers_of_two():
    assert tiled.block_sizes(64, 100 * 1024, 2) == (128, 64)  # M / 4d = 200 rows, and d
    assert tiled.block_sizes(128, 100 * 1024, 2) == (64, 64)  # 100 rows
    assert tiled.block_sizes(256, 100 * 1024, 4) == (16, 16)  # 25 rows
    assert tiled.block_sizes(8, 1, 4) == (1, 1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("algorithm", "seqlen", "head_dim", "density", "changes"),
    [
        ("standard", 300, 40, 1.0, {}),
        ("standard", 256, 64, 1.0, {"dtype": torch.float32}),
        ("tiled", 256, 64, 1.0, {}),
        ("tiled", 300, 40, 1.0, {"dtype": torch.float32}),
        ("tiled", 256, 64, 1.0, {"on_chip_bytes": 10_000}),
        ("block_sparse", 512, 64, 1.0, {}),
        ("block_sparse", 512, 64, 0.25, {}),
        ("block_sparse", 1024, 128, 0.1, {"dtype": torch.float32}),
        ("block_sparse", 256, 64, 0.0, {}),
    ],
)
def test_bytes_moved_are_those_of_theory(algorithm, seqlen, head_dim, density, changes, backward):
    row = bytes_moved(algorithm, seqlen, head_dim, density, backward=backward, **changes)
    assert row["bytes_read"] + row["bytes_written"] == row["theory_bytes"]


def test_bytes_moved_are_those_counted_by_hand():
    # 256 queries in two tiles of 128: q once, k and v twice; out, and two float32 a query; 128 bytes a row of bfloat16
    row = bytes_moved("tiled", 256, 64)
    assert row == {"bytes_read": 5 * 256 * 128, "bytes_written": 256 * (128 + 8), "theory_bytes": 256 * (6 * 128 + 8)}


def test_every_batch_and_query_head_moves_its_own_bytes():
    one, many = (make(256, 256, h, 1, head_dim=64, dtype=torch.bfloat16, batch_size=h // 2) for h in (2, 6))
    counted = []
    for tensors in (one, many):
        with tiled.counting() as counted_here:
            tiled.attention(*tensors[:3], make_options())
        counted.append(counted_here)
    assert counted[0].bytes_read == 2 * bytes_moved("tiled", 256, 64)["bytes_read"]
    assert counted[1].bytes_read == 9 * counted[0].bytes_read
    assert counted[1].bytes_written == 9 * counted[0].bytes_written


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_bytes_moved_fall_with_memory_and_are_linear_in_the_density(backward):
    def moved(algorithm, **changes):
        return bytes_moved(algorithm, 1024, 64, backward=backward, **changes)["bytes_read"]

    assert moved("tiled") < moved("standard") / 2
    assert moved("tiled", on_chip_bytes=25 * 1024) > 3 * moved("tiled")  # a quarter of the memory
    none, half, whole = (moved("block_sparse", density=density) for density in (0.0, 0.5, 1.0))
    assert half - none == whole - half
    assert whole == moved("tiled")


@pytest.mark.parametrize(
    ("options", "tiles"),  # of 128 queries x 64 keys, 4 x 8 of them
    [
        ({}, 32),
        ({"causal": True}, 20),
        ({"causal": True, "window_size": (64, 0)}, 11),
        ({"causal": True, "window_size": (65, 0)}, 14),
        ({"window_size": (0, 0)}, 8),
    ],
)
def test_what_the_mask_rules_out_is_not_read(options, tiles):
    q, k, v, _ = make(512, 512, 1, 1, head_dim=64, dtype=torch.bfloat16, batch_size=1)
    with tiled.counting() as counted_here:
        tiled.attention(q, k, v, make_options(**options))
    assert counted_here.bytes_read == q.nbytes + tiles * 2 * 64 * 128
