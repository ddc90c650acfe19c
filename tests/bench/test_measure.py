import pytest
import torch

from flashlab.attention.backends import BACKENDS
from flashlab.attention.reference import attention as standard
from flashlab.bench import measure as module
from flashlab.bench.case import Case
from flashlab.bench.flops import PASSES
from flashlab.bench.measure import ceilings, measure
from flashlab.errors import UserError

CASE = Case(1, 64, 2, 1, 16, "float32", "causal", "cpu")
QUICK = {"budget_ms": 1.0, "min_repeats": 3, "max_repeats": 4}


@pytest.fixture(autouse=True)
def _nothing_remembered():
    module._verdict.cache_clear()


def plant(monkeypatch, run, name="sdpa_math"):
    monkeypatch.setitem(BACKENDS, name, BACKENDS["standard"]._replace(run=run))


@pytest.mark.parametrize("pass_name", PASSES)
def test_a_row_says_what_was_measured(pass_name):
    row = measure(CASE, "auto", pass_name, **QUICK)
    assert (row["status"], row["reason"], row["pass"], row["backend"]) == ("ok", None, pass_name, "auto")
    assert row["resolved"] in BACKENDS
    assert 0 < row["latency_ms_p10"] <= row["latency_ms"] <= row["latency_ms_p90"]
    assert 3 <= row["repeats"] <= 4
    assert row["tflops_per_s"] * row["latency_ms"] * 1e9 == pytest.approx(4 * 64 * 64 * 2 * 16 / 2 * PASSES[pass_name])
    assert 0 < row["error_ratio"] < 1


def test_a_refusal_is_a_row_with_the_reason():
    row = measure(CASE, "flash_attention_2", "backward", **QUICK)
    assert (row["status"], row["latency_ms"]) == ("unsupported", None)
    assert row["reason"] == "it needs a CUDA device; the inputs are on cpu"


def test_what_is_wrong_is_not_timed(monkeypatch):
    plant(monkeypatch, lambda q, k, v, options: standard(q, k, v, options._replace(causal=False)))
    row = measure(CASE, "sdpa_math", "forward", **QUICK)
    assert (row["status"], row["latency_ms"]) == ("wrong", None)
    assert row["reason"].startswith("out: error")


def test_a_backward_pass_is_judged_too(monkeypatch):
    def run(q, k, v, options):
        return standard(q, k, v.detach() + 0.999 * (v - v.detach()), options)

    plant(monkeypatch, run)
    assert measure(CASE, "sdpa_math", "forward", **QUICK)["status"] == "ok"
    assert measure(CASE, "sdpa_math", "forward_backward", **QUICK)["reason"].startswith("dv: error")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("CUDA error: an illegal memory access\nwas encountered"), "failed"),
        (AssertionError(), "failed"),
    ],
    ids=str,
)
def test_what_an_implementation_raises_is_a_row(error, status, monkeypatch):
    def run(*_):
        raise error

    plant(monkeypatch, run)
    row = measure(CASE, "sdpa_math", "backward", **QUICK)
    assert row["status"] == status
    assert row["reason"].startswith(type(error).__name__)
    assert "\n" not in row["reason"]


@pytest.mark.parametrize(("backend", "mask"), [("standart", "full"), ("standard", "casual")])
def test_a_name_that_does_not_exist_is_no_row(backend, mask):
    with pytest.raises(UserError, match="did you mean"):
        measure(Case(1, 8, 1, 1, 8, "float32", mask, "cpu"), backend)


def test_ceilings_are_of_the_fastest_call_at_any_moment(monkeypatch):
    """A machine that is busy most of the time still shows once what it can do."""
    rest, dtypes = [], []

    def timer(call, *_):
        dtypes.append(call.args[0].dtype if call.func is torch.mm else None)
        rest.append(call)
        return [30.0, 2.0 if len(rest) == 5 else 20.0, 40.0]

    monkeypatch.setitem(module._TIMERS, "cpu", timer)
    monkeypatch.setitem(module.CEILING_SIZES, "cpu", ((8, 16), 2**12))
    found = ceilings("cpu", ["float32", "float16"])
    assert found["matmul_tflops_per_s"] == pytest.approx(2 * 16**3 / 2.0 / 1e9)
    assert found["copy_gb_per_s"] == pytest.approx(2 * 2**12 / 20.0 / 1e6)
    assert set(dtypes) == {torch.float32, None}  # a product in float16 takes a CPU seconds


def test_ceilings_of_the_cpu():
    roof = ceilings("cpu", ["float32"])
    assert all(value > 0 for value in roof.values())


@pytest.mark.gpu
class TestOnAGpu:
    def test_times_are_those_of_the_kernels(self):
        size = 4096
        a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        times = module._time_cuda(lambda: a @ a, 50.0, 5, 20, 3)
        assert 2 * size**3 / min(times) / 1e9 < 3000  # TFLOP/s: no GPU does that, so nothing was skipped
        tiny = torch.ones(8, device="cuda")
        # Ten launches take Python longer than the GPU: if it had waited for them, this would be more than 0.1 ms.
        assert sorted(module._time_cuda(lambda: [tiny.add_(1) for _ in range(10)], 50.0, 20, 40, 3))[10] < 0.1

    def test_memory_of_standard_attention_is_quadratic_and_that_of_a_fused_kernel_linear(self):
        def peak(backend, seqlen):
            case = Case(2, seqlen, 4, 4, 64, "bfloat16", "full", "cuda")
            return measure(case, backend, "forward", **QUICK)["peak_memory_mib"]

        assert 3.5 < peak("standard", 4096) / peak("standard", 2048) < 4.5
        assert 1.8 < peak("sdpa_flash", 4096) / peak("sdpa_flash", 2048) < 2.2
        assert peak("sdpa_flash", 4096) == pytest.approx(4 + 2 * 4 * 4096 * 4 / 2**20, rel=0.2)  # out and logsumexp

    def test_running_out_of_memory_leaves_the_gpu_usable(self):
        huge = Case(64, 65536, 64, 64, 64, "bfloat16", "full", "cuda")
        assert measure(huge, "standard", "forward", **QUICK)["status"] == "oom"
        assert measure(Case(1, 64, 2, 2, 64, "bfloat16", "full", "cuda"), "standard", **QUICK)["status"] == "ok"
