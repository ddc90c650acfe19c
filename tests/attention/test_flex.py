"""What is particular to flex_attention: the blocks it visits, what is compiled and how often, its kernels' limits."""

import gc
import weakref

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

from flashlab.attention import flex, reference
from flashlab.attention.spec import BLOCK_SIZE, Cache, Options, Packing
from flashlab.errors import UserError

CPU = torch.device("cpu")
SLOPES = torch.tensor([[0.5, 0.25, 0.125, 1.0], [1.0, 0.0, 0.3, 0.1]])
# (seqlen_q, seqlen_k, num_kv_heads, options), of 4 query heads and two sequences
CASES = {
    "full": (130, 257, 4, {}),
    "causal": (257, 257, 2, {"causal": True}),
    "causal, more queries": (300, 70, 4, {"causal": True}),
    "causal, more keys": (70, 300, 1, {"causal": True}),
    "window": (300, 300, 4, {"window_size": (140, 9)}),
    "window, causal": (128, 384, 2, {"window_size": (30, -1), "causal": True}),
    "soft cap and ALiBi": (200, 300, 4, {"softcap": 2.0, "alibi_slopes": SLOPES[0], "causal": True}),
    "ALiBi by sequence": (200, 130, 4, {"alibi_slopes": SLOPES}),
    "block mask": (300, 400, 2, {"block_mask": torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]) > 0}),
    "block mask, window": (300, 260, 4, {"block_mask": torch.eye(3) > 0, "window_size": (200, 60)}),
}


def make(seqlen_q, seqlen_k, num_kv_heads, head_dim=32, dtype=torch.float32, device=CPU, num_heads=4, batch_size=2):
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(seqlen_q, num_heads), (seqlen_k, num_kv_heads), (seqlen_k, num_kv_heads), (seqlen_q, num_heads)]
    tensors = (torch.randn(batch_size, *shape, head_dim, generator=generator) for shape in shapes)
    return [x.to(device, dtype) for x in tensors]


def make_options(device=CPU, **options):
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return Options(**{"softmax_scale": 0.2} | options)


def make_packing(lengths_q, lengths_k, device=CPU):
    ends = (torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    return Packing(*ends, max(lengths_q), max(lengths_k))


def run(attention, q, k, v, grad_out, *arguments):
    """Return out, dq, dk and dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, *arguments)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def check(tensors, *arguments, attention=flex.attention, standard=reference.attention):
    """Hold out, dq, dk and dv to the rule of the reference."""
    *mine, options = arguments
    got = run(attention, *tensors, *arguments)
    low = run(standard, *tensors, *arguments)
    exact = run(standard, *(x.double() for x in tensors), *mine, options)
    q, k, v, grad_out = (float(x.norm(dim=-1).max()) for x in tensors)
    largest_product = max(options.softmax_scale * q * k, grad_out * v)
    for name, x, y, ref in zip(("out", "dq", "dk", "dv"), got, low, exact, strict=True):
        error, allowed = float((x.double() - ref).abs().max()), reference.allowed_error(y, ref, largest_product)
        assert x.dtype == y.dtype
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g}"  # NaN fails too


@pytest.fixture
def cpu_gradients(monkeypatch):
    """Take away torch's refusal: its dense form on the CPU has gradients, of the masks and biases that kernels get."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


@pytest.fixture
def fresh():
    """Forget what was compiled; return a function that counts what is compiled from here on."""
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_masks_and_biases_give_the_same_attention_and_gradients(case, dtype, cpu_gradients):
    *shape, options = CASES[case]
    check(make(*shape, dtype=dtype), make_options(**options))


@pytest.mark.parametrize("seqlen_k", [1, 127, 128, 129, 512, 640])
@pytest.mark.parametrize("seqlen_q", [1, 127, 128, 129, 512, 640])
def test_the_blocks_are_those_that_torch_finds_by_trying_every_pair(seqlen_q, seqlen_k):
    shift = seqlen_k - seqlen_q
    for left, right in (
        (flex._UNLIMITED, 0),
        (200, 0),
        (flex._UNLIMITED, 50),
        (100, flex._UNLIMITED),
        (0, 0),
        (5, 400),
    ):
        tables = flex._band_tables(seqlen_q, seqlen_k, left, right, CPU)

        def visible(b, h, i, j, left=left, right=right):
            return (i + shift - j <= left) & (i + shift - j >= -right)

        expected = torch_flex.create_block_mask(visible, None, None, seqlen_q, seqlen_k, device="cpu")
        for name, mine in tables._asdict().items():
            its = getattr(expected, name)
            assert torch.equal(mine, its), name
            assert (mine.dtype, mine.stride()) == (its.dtype, its.stride()), name


@pytest.mark.parametrize("one_list", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_every_visible_pair_is_in_a_listed_block_and_full_blocks_hide_none(masked, one_list):
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 500, (2, 390), generator=generator, dtype=torch.int32).sort().values
    end = first + torch.randint(0, 300, (2, 390), generator=generator, dtype=torch.int32)
    first[:, 128:256], end[0, 128:256], end[1, 128:256] = 130, 500, 520  # a block of queries with full blocks of keys
    end[:, 300:] = 0  # queries that see nothing
    block_mask = torch.rand(4, 5, generator=generator) < 0.6 if masked else None
    tables = flex._tables(first, end, 530, block_mask, one_list)

    key = torch.arange(5 * BLOCK_SIZE)
    sees = torch.zeros(2, 4 * BLOCK_SIZE, 5 * BLOCK_SIZE, dtype=torch.bool)
    sees[:, :390] = (key >= first[..., None]) & (key < end[..., None])
    if block_mask is not None:
        sees &= block_mask.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)
    sees = sees.view(2, 4, BLOCK_SIZE, 5, BLOCK_SIZE).transpose(2, 3)

    def listed(number, indices):
        chosen = torch.zeros(indices.shape, dtype=torch.bool)
        for row, n in enumerate(number.flatten().tolist()):
            chosen.view(-1, indices.shape[-1])[row, indices.reshape(-1, indices.shape[-1])[row, :n].long()] = True
        return chosen[:, 0]

    partly, full = listed(*tables[:2]), torch.zeros(2, 4, 5, dtype=torch.bool)
    assert torch.equal(listed(*tables[4:6]), partly.mT)
    if one_list:
        assert tables.full_kv_indices is tables.full_q_indices is None
    else:
        full = listed(*tables[2:4])
        assert torch.equal(listed(*tables[6:]), full.mT)
        assert torch.equal(full, sees.all(-1).all(-1))
        assert full.any()
    assert (partly | full)[sees.any(-1).any(-1)].all()
    assert not (partly & full).any()
    assert not (partly | full)[:, 3].any()  # where nothing is seen nothing is visited
    assert block_mask is None or not (partly | full)[:, ~block_mask].any()


def test_a_long_mask_takes_no_memory_of_length_squared():
    with torch.profiler.profile(profile_memory=True) as profile:
        tables = flex._band_tables(2**16, 2**16, 256, 0, CPU)
    assert int(tables.kv_num_blocks.sum() + tables.full_kv_num_blocks.sum()) == 3 * 512 - 3
    assert (
        max(event.self_cpu_memory_usage for event in profile.key_averages()) < 20 * 512**2 * 8
    )  # S * S is 800 times 8


def test_each_kind_of_call_is_compiled_once_and_remembers_no_values(fresh):
    def call(*shape, **options):
        q, k, v, _ = make(*shape)
        options = make_options(**options)
        assert torch.allclose(flex.attention(q, k, v, options), reference.attention(q, k, v, options), atol=1e-5)

    kinds = [{"window_size": (n, 0)} for n in range(12)]  # more than torch.compile keeps for one function
    for n, kind in enumerate(kinds):
        call(150 + n, 150, 2, **kind)
    assert fresh() == len(kinds)
    for n, kind in enumerate(kinds):
        call(150 + n, 150, 2, **kind)
    assert fresh() == len(kinds)
    for slopes in SLOPES:
        call(150, 150, 2, alibi_slopes=slopes)
    for blocks in ([[1, 0], [0, 1]], [[0, 1], [0, 0]]):
        call(150, 150, 2, block_mask=torch.tensor(blocks) > 0)
    assert fresh() == len(kinds) + 2


def test_changing_numbers_of_packed_rows_are_compiled_three_times_at_most(fresh, cpu_gradients):
    for lengths in ([300, 5], [40, 0, 290], [500], [130, 1, 1, 260], [7, 150], [200, 70, 80]):
        packing, options = make_packing(lengths, lengths), make_options(causal=True)
        tensors = [x[0] for x in make(sum(lengths), sum(lengths), 2, batch_size=1)]
        check(tensors, packing, options, attention=flex.attention_packed, standard=reference.attention_packed)
    assert fresh() <= 3


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (20, 3), "softcap": 2.0}])
@pytest.mark.parametrize(
    "slopes", [None, SLOPES[0], torch.cat([SLOPES, SLOPES])], ids=["plain", "ALiBi", "by sequence"]
)
def test_packed_sequences(options, slopes, cpu_gradients):
    lengths_q, lengths_k = [5, 1, 0, 130], [5, 40, 3, 129]
    q, _, _, grad_out = make(sum(lengths_q), 1, 2, batch_size=1)
    _, k, v, _ = make(1, sum(lengths_k), 2, batch_size=1)
    arguments = make_packing(lengths_q, lengths_k), make_options(alibi_slopes=slopes, **options)
    tensors = [x[0] for x in (q, k, v, grad_out)]
    check(tensors, *arguments, attention=flex.attention_packed, standard=reference.attention_packed)


@pytest.mark.parametrize("new", [1, 7, 100])
def test_slopes_and_windows_in_a_cache(new, device):
    for filled in ([0, 300 - new], [127, 128]):
        q, k_cache, v_cache, _ = make(new, 300, 2, device=device)
        k, v, *_ = make(new, new, 2, num_heads=2, device=device)
        cache = Cache(torch.tensor(filled, dtype=torch.int32, device=device), k, v)
        for options in ({"alibi_slopes": SLOPES}, {"window_size": (60, -1)}, {"softcap": 1.0}):
            arguments = cache, make_options(device, causal=True, **options)
            caches = [[x.clone() for x in (k_cache, v_cache)] for _ in range(2)]
            got = flex.attention_with_kvcache(q, *caches[0], *arguments)
            expected = reference.attention_with_kvcache(q, *caches[1], *arguments)
            assert torch.allclose(got, expected, atol=1e-5)
            assert all(torch.equal(mine, its) for mine, its in zip(*caches, strict=True))


@pytest.mark.slow
def test_a_compiled_kernel_visits_the_right_blocks(monkeypatch):
    """Let torch write its C++ kernel, which serves inference on the CPU: it visits blocks as those for GPUs do."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **keywords: compile_with(f, **keywords | {"backend": "inductor"}))
    flex._compiled.cache_clear()
    with torch.no_grad():
        for *shape, options in CASES.values():
            (q, k, v, _), options = make(*shape), make_options(**options)
            assert torch.allclose(flex.attention(q, k, v, options), reference.attention(q, k, v, options), atol=1e-5)
        for lengths in ([150, 0, 160], [7, 200, 1, 90], [170, 50]):
            (q, k, v, _), packing = make(sum(lengths), sum(lengths), 2, batch_size=1), make_packing(lengths, lengths)
            arguments = q[0], k[0], v[0], packing, make_options(causal=True, alibi_slopes=torch.rand(len(lengths), 4))
            assert torch.allclose(flex.attention_packed(*arguments), reference.attention_packed(*arguments), atol=1e-5)
        test_slopes_and_windows_in_a_cache(1, CPU)
    flex._compiled.cache_clear()


def test_compiles_into_the_callers_graph():
    torch._dynamo.reset()
    compiled = torch.compile(flex.attention, fullgraph=True, backend="aot_eager")
    for blocks in ([[1, 0], [1, 1]], [[0, 1], [0, 0]]):  # a graph must not remember the first
        q, k, v, _ = make(150, 200, 2)
        options = make_options(block_mask=torch.tensor(blocks) > 0, causal=True, alibi_slopes=SLOPES)
        assert torch.allclose(compiled(q, k, v, options), reference.attention(q, k, v, options), atol=1e-5)
    compiled = torch.compile(flex.attention_packed, fullgraph=True, backend="aot_eager")
    for lengths in ([150, 3], [100, 60], [20, 30]):
        (q, k, v, _), packing = make(sum(lengths), sum(lengths), 2, batch_size=1), make_packing(lengths, lengths)
        arguments = q[0], k[0], v[0], packing, make_options(causal=True, alibi_slopes=SLOPES)
        assert torch.allclose(compiled(*arguments), reference.attention_packed(*arguments), atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_comes_before_training(mode, cpu_gradients):
    flex._remembered_tables.cache_clear()
    *tensors, grad_out = make(150, 150, 2)
    options = make_options(causal=True)
    with mode():
        flex.attention(*(x.clone().requires_grad_() for x in tensors), options)
    check([*tensors, grad_out], options)  # with the tables that inference made


def test_keeps_no_tensor_alive():
    q, k, v, _ = make(150, 150, 2)
    slopes, block_mask = SLOPES.clone(), torch.ones(2, 2, dtype=torch.bool)
    flex.attention(q, k, v, make_options(alibi_slopes=slopes, block_mask=block_mask))
    alive = [weakref.ref(x) for x in (q, k, v, slopes, block_mask)]
    del q, k, v, slopes, block_mask
    gc.collect()
    assert [x() for x in alive] == [None] * 5


def test_never_runs_uncompiled(fresh):
    q, k, v, _ = make(16, 16, 2)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(UserError, match=r"torch.compile, which is switched off"),
    ):
        flex.attention(q, k, v, make_options())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": CPU, "needs_grad": True}, "torch has no backward pass of it on the CPU"),
        ({"device": torch.device("meta")}, "it needs a CUDA device or the CPU; the inputs are on meta"),
        ({"dtype": torch.float64}, "it computes in float16, bfloat16 or float32; the inputs are float64"),
        ({"head_dim": 8}, "it takes head_dim from 16 to 256; got 8"),
        ({"head_dim": 264}, "it takes head_dim from 16 to 256; got 264"),
        ({"head_dim": 20}, "it takes head_dim in multiples of 8; got 20"),
        ({"seqlen_k": 2**24}, "its kernels count the elements of a sequence in 32 bits; these are 2**31 or more"),
    ],
)
def test_refuses_with_a_reason(changes, reason, make_spec):
    assert flex.why_not(make_spec(**{"device": torch.device("cuda")} | changes)) == reason


def test_a_missing_compiler_is_named(make_spec, monkeypatch):
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    flex._compiler_problem.cache_clear()
    reason = flex.why_not(make_spec(device=torch.device("cuda")))
    flex._compiler_problem.cache_clear()
    assert reason == "torch.compile needs a C compiler, and there is no gcc or clang on the PATH"


# On a GPU: what Triton makes of it. Each case compiles for some seconds.


@pytest.fixture
def cuda(make_spec):
    if (reason := flex.why_not(make_spec(device=torch.device("cuda")))) is not None:
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gpu_masks_and_biases(case, dtype, cuda):
    *shape, options = CASES[case]
    check(make(*shape, head_dim=64, dtype=dtype, device=cuda), make_options(cuda, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 96, 128, 192, 256])
def test_gpu_head_dims(head_dim, dtype, cuda):
    check(make(200, 333, 2, head_dim, dtype, cuda), make_options(cuda, causal=True, softcap=5.0))


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q", [1, 3, 31, 100, 128])
def test_gpu_short_sequences_with_gradients(seqlen_q, cuda):
    for num_heads in (4, 6):
        tensors = make(seqlen_q, 200, 2, 64, torch.bfloat16, cuda, num_heads=num_heads)
        check(tensors, make_options(cuda, causal=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_gpu_decoding(head_dim, dtype, cuda):
    for new, num_heads, places in ((1, 4, 300), (1, 16, 4096), (5, 12, 1000), (100, 4, 1000)):
        q, k_cache, v_cache, _ = make(new, places, 2, head_dim, dtype, cuda, num_heads=num_heads)
        k, v, *_ = make(new, new, 2, head_dim, dtype, cuda, num_heads=2)
        for filled in ([0, places - new], [127, 128]):
            cache = Cache(torch.tensor(filled, dtype=torch.int32, device=cuda), k, v)
            arguments = k_cache, v_cache, cache, make_options(cuda, causal=True)
            got = flex.attention_with_kvcache(q, *arguments)
            low = reference.attention_with_kvcache(q, *arguments)
            wide = cache._replace(k=k.double(), v=v.double())
            exact = reference.attention_with_kvcache(
                q.double(), k_cache.double(), v_cache.double(), wide, make_options(cuda, causal=True)
            )
            largest_product = float(0.2 * q.norm(dim=-1).max() * k_cache.norm(dim=-1).max())
            assert (got.double() - exact).abs().max() <= reference.allowed_error(low, exact, largest_product)


@pytest.mark.gpu
def test_gpu_packed_rows_vary(cuda, fresh):
    for lengths in ([300, 5], [40, 0, 290], [500], [130, 1, 1, 260], [7, 150], [200, 70, 80]):
        packing = make_packing(lengths, lengths, cuda)
        options = make_options(cuda, causal=True, alibi_slopes=SLOPES[0])
        tensors = [x[0] for x in make(sum(lengths), sum(lengths), 2, 64, torch.bfloat16, cuda, batch_size=1)]
        check(tensors, packing, options, attention=flex.attention_packed, standard=reference.attention_packed)
    assert fresh() <= 3


@pytest.mark.gpu
def test_gpu_compiles_into_the_callers_graph(cuda):
    compiled = torch.compile(flex.attention, fullgraph=True)
    tensors = make(300, 400, 2, 64, torch.bfloat16, cuda)
    for blocks in ([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]], [[0, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]]):
        options = make_options(cuda, causal=True, block_mask=torch.tensor(blocks) > 0, alibi_slopes=SLOPES)
        check(tensors, options, attention=compiled)
    lengths = [200, 70, 80]
    tensors = [x[0] for x in make(sum(lengths), sum(lengths), 2, 64, torch.bfloat16, cuda, batch_size=1)]
    arguments = make_packing(lengths, lengths, cuda), make_options(cuda, causal=True)
    compiled = torch.compile(flex.attention_packed, fullgraph=True)
    check(tensors, *arguments, attention=compiled, standard=reference.attention_packed)


@pytest.mark.gpu
def test_gpu_backward_gives_the_same_bits(cuda):
    tensors, options = make(1000, 1000, 2, 64, torch.bfloat16, cuda), make_options(cuda, causal=True)
    first = run(flex.attention, *tensors, options)
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(run(flex.attention, *tensors, options), first, strict=True))


@pytest.mark.gpu
def test_gpu_memory_is_linear_and_time_follows_the_blocks(cuda):
    tensors = make(2**14, 2**14, 8, 128, torch.bfloat16, cuda, num_heads=8, batch_size=1)
    generator = torch.Generator().manual_seed(0)
    milliseconds = {}
    for density in (1.0, 0.125):
        options = make_options(cuda, block_mask=torch.rand(128, 128, generator=generator) < density)
        run(flex.attention, *tensors, options)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run(flex.attention, *tensors, options)
        end.record()
        end.synchronize()
        milliseconds[density] = start.elapsed_time(end)
        assert torch.cuda.max_memory_allocated() - before < 12 * tensors[0].nbytes  # one head's scores are 16 times q
    assert milliseconds[0.125] < 0.3 * milliseconds[1.0]


@pytest.mark.gpu
def test_gpu_views_with_offsets_beyond_32_bits(cuda):
    """Lay keys and values out between other heads, so that the first and the last are 2**31 elements apart."""
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("it takes 8 GiB of GPU memory")
    room = torch.zeros(1, 2**15, 2**9 + 8, 128, dtype=torch.bfloat16, device=cuda)
    q, k, v, _ = make(200, 2**15, 1, 128, torch.bfloat16, cuda, num_heads=2, batch_size=1)
    room[:, :, 2:3], room[:, :, 5:6] = k, v
    options = make_options(cuda, window_size=(300, 0))
    got = flex.attention(q, room[:, :, 2:3], room[:, :, 5:6], options)
    assert torch.equal(got, flex.attention(q, k, v, options))
