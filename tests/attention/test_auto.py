import json
import logging
from pathlib import Path

import pytest
import torch

from flashlab.attention import auto, backends, support

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def cell(ranking, seqlen=2048, *, dtype="bfloat16", head_dim=64, mask="causal", needs_grad=False):
    """Write a row of a table; the first backend is the fastest."""
    ratios = {name: 1 + index / 4 for index, name in enumerate(ranking.split())}
    key = {"dtype": dtype, "head_dim": head_dim, "mask": mask, "needs_grad": needs_grad, "seqlen": seqlen}
    return {**key, "backends": ratios}


def table(*rows, device="a GPU", capability="9.0", wrong=(), key=None):
    facts = {"schema": auto.SCHEMA, "kind": auto.KIND, "key": key or {"device": device}, "capability": capability}
    return json.dumps({**facts, "rows": rows, "wrong": list(wrong)})


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """Let no table of this machine's user be found."""
    monkeypatch.setenv("FLASHLAB_CACHE", str(tmp_path))
    loaded = auto._tables, auto.device_key
    for cached in loaded:
        cached.cache_clear()
    yield
    for cached in loaded:
        cached.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Let a GPU be one where every backend runs everything, except where it is told not to, and these rows measured."""

    def give(*rows, refusing=(), **options):
        found = auto.parse(table(*rows, **options))
        monkeypatch.setattr(auto, "_tables", lambda device: (("measured here", found),))
        monkeypatch.setattr(backends, "why_not", lambda name, spec: "it refuses" if name in refusing else None)

    return give


@pytest.fixture
def call(make_spec):
    def make(seqlen=2048, **changes):
        spec = {"seqlen_q": seqlen, "seqlen_k": seqlen, "head_dim": 64, "device": CUDA, "causal": True}
        return make_spec(**spec | changes)

    return make


ROWS = [
    cell("sdpa_cudnn flash_attention_4 flash_attention_2 sdpa_flash", 512),
    cell("flash_attention_4 sdpa_cudnn flash_attention_2 sdpa_flash", 2048),
    cell("sdpa_flash flash_attention_2 flash_attention_4", 16384),
    cell("sdpa_cudnn flash_attention_2", 2048, mask="full"),
    cell("flash_attention_2 sdpa_cudnn", 2048, needs_grad=True),
    cell("flex_attention sdpa_cudnn", 2048, head_dim=128),
]


@pytest.mark.parametrize(
    ("changes", "backend", "where"),
    [
        ({"seqlen": 2048}, "flash_attention_4", "head_dim 64, length 2048"),
        ({"seqlen": 1000}, "sdpa_cudnn", "length 512"),
        ({"seqlen": 1100}, "flash_attention_4", "length 2048"),
        ({"seqlen": 100_000}, "sdpa_flash", "length 16384"),
        ({"seqlen": 128}, "sdpa_cudnn", "length 512"),
        ({"seqlen": 127}, "flash_attention_2", "fixed order"),
        ({"seqlen_q": 1}, "flash_attention_2", "fixed order"),
        ({"seqlen_q": 1, "layout": "cache"}, "flash_attention_2", "fixed order"),
        ({"causal": False}, "sdpa_cudnn", "length 2048"),
        ({"causal": False, "seqlen_q": 512, "seqlen_k": 8192}, "sdpa_cudnn", "length 2048"),
        ({"needs_grad": True}, "flash_attention_2", "length 2048"),
        ({"dtype": torch.float16}, "flash_attention_4", "length 2048"),
        ({"dtype": torch.float32}, "flash_attention_2", "fixed order"),
        ({"head_dim": 40}, "flash_attention_4", "head_dim 64"),
        ({"head_dim": 72}, "flex_attention", "head_dim 128"),
        ({"head_dim": 256}, "flash_attention_2", "fixed order"),
        ({"batch_size": 64, "num_kv_heads": 1}, "flash_attention_4", "length 2048"),
        ({"seqlen": 512, "window_size": (128, 0)}, "flash_attention_4", "length 512"),
        ({"seqlen": 512, "layout": "packed"}, "flash_attention_4", "length 512"),
        ({"seqlen": 512, "seqlen_k": 1024}, "flash_attention_4", "length 512"),
    ],
    ids=str,
)
def test_the_nearest_measured_call_decides(changes, backend, where, measured, call):
    measured(*ROWS)
    choice = auto.choose(call(**changes))
    assert choice.backend == backend
    assert where in choice.source


def test_the_next_that_runs_is_taken_and_the_refusals_are_told(measured, call):
    measured(*ROWS, refusing=("flash_attention_4", "sdpa_cudnn"))
    choice = auto.choose(call())
    assert choice.backend == "flash_attention_2"
    assert choice.refused == (("flash_attention_4", "it refuses"), ("sdpa_cudnn", "it refuses"))
    measured(*ROWS, refusing=[name for name in auto.ORDER["cuda"] if name != "sdpa_efficient"])
    assert auto.choose(call())[:2] == ("sdpa_efficient", auto.NOT_MEASURED)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({}, "standard"),
        ({"dtype": torch.float16}, "flex_attention"),
        ({"seqlen_k": 4096}, "flex_attention"),
        ({"seqlen_q": 2}, "flex_attention"),
        ({"causal": False}, "sdpa_flash"),
    ],
    ids=str,
)
def test_one_query_and_a_short_cache_are_not_worth_the_tables_of_flex_attention(changes, backend, measured, call):
    measured(*ROWS, refusing=("flash_attention_2", "flash_attention_3", "flash_attention_4"))
    spec = call(**{"layout": "cache", "seqlen_q": 1, "seqlen_k": 528, "dtype": torch.float32} | changes)
    assert auto.choose(spec).backend == backend


@pytest.mark.parametrize("changes", [{}, {"layout": "cache", "seqlen_q": 1}, {"alibi": True}], ids=str)
def test_what_the_check_calls_wrong_is_never_chosen(changes, measured, call):
    names = [name for name in auto.ORDER["cuda"] if name not in ("sdpa_efficient", "standard")]
    measured(*ROWS, wrong=[{"backend": name, "dtype": "bfloat16", "head_dim": 64} for name in names])
    assert auto.choose(call(**changes)).backend == "sdpa_efficient"
    assert auto.choose(call(head_dim=128)).backend == "flex_attention"
    measured(*ROWS, wrong=[{"backend": name, "dtype": "bfloat16", "head_dim": 64} for name in auto.ORDER["cuda"]])
    assert auto.choose(call(**changes)).backend == "standard"


def test_a_backend_that_keeps_all_scores_is_not_chosen_for_some_percent_of_time(measured, call):
    measured(cell("standard sdpa_flash", 512), cell("standard sdpa_flash", 8192))
    assert auto.choose(call(512)).backend == "standard"
    assert auto.choose(call(8192)).backend == "sdpa_flash"


def test_a_block_mask_goes_to_a_kernel_that_skips_blocks(monkeypatch, call):
    monkeypatch.setattr(backends, "why_not", lambda name, spec: "no" if name.startswith("flash") else None)
    assert auto.choose(call(block_sparse=True)).backend == "flex_attention"
    assert auto.choose(call()).backend == "sdpa_flash"


@pytest.mark.parametrize("feature", support.FEATURES)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_every_feature_finds_a_backend_that_supports_it(feature, needs_grad, device, make_spec):
    spec = make_spec(**support.PLAIN | {"device": device, "needs_grad": needs_grad} | support.FEATURES[feature])
    choice = auto.choose(spec)
    assert backends.why_not(choice.backend, spec) is None
    assert all(backends.why_not(name, spec) == reason for name, reason in choice.refused)


def test_every_order_holds_known_backends_and_ends_on_standard_attention():
    for order in (*auto.ORDER.values(), *auto.MASKED_ORDER.values()):
        assert order[-1] == "standard"
        assert set(order) <= set(backends.BACKENDS)


def test_the_tuned_table_counts_before_the_fixed_order(make_spec):
    row = cell("sdpa_math standard", 512, dtype="float32")
    auto.tuned_path(CPU).write_text(table(row, key=auto.device_key(CPU), capability=None))
    spec = make_spec(seqlen_q=512, seqlen_k=512, head_dim=64, causal=True, dtype=torch.float32)
    assert auto.choose(spec) == auto.Choice("sdpa_math", "measured on this machine: head_dim 64, length 512")


def test_other_versions_have_another_table(monkeypatch, make_spec):
    row = cell("sdpa_math", 512, dtype="float32")
    auto.tuned_path(CPU).write_text(table(row, key=auto.device_key(CPU), capability=None))
    auto.device_key.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    spec = make_spec(seqlen_q=512, seqlen_k=512, head_dim=64, causal=True, dtype=torch.float32)
    assert auto.choose(spec) == auto.Choice("sdpa_flash", auto.NOT_MEASURED)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "not JSON",
        table(cell("sdpa_math"))[:-9],
        "[]",
        "{}",
        table(cell("sdpa_math")).replace('"schema": 1', '"schema": 99'),
        table({"dtype": "float32"}),
        table(cell("sdpa_math") | {"backends": ["sdpa_math"]}),
        table(cell("sdpa_math", seqlen=0)),
        table(cell("sdpa_math"), key={"device": "another machine"}),
        b"\xff\xfe",
        Path,  # a folder
    ],
    ids=str,
)
def test_a_damaged_table_is_ignored_with_one_warning(damaged, make_spec, caplog):
    path = auto.tuned_path(CPU)
    if damaged is Path:
        path.mkdir()
    else:
        path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with caplog.at_level(logging.INFO, logger="flashlab.attention"):
        for seqlen in (512, 600):
            assert auto.choose(make_spec(seqlen_q=seqlen, seqlen_k=seqlen)).backend == "sdpa_flash"
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(path) in message
    assert "`flashlab tune` will rebuild it" in message
    assert "\n" not in message


def test_where_nothing_can_be_kept_nothing_is_said(monkeypatch, tmp_path, make_spec, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHLAB_CACHE", str(tmp_path / "file" / "folder"))
    assert auto.choose(make_spec()).source == auto.NOT_MEASURED
    auto.forget()
    monkeypatch.delenv("FLASHLAB_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(path):
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert auto.choose(make_spec()).source == auto.NOT_MEASURED
    assert not caplog.records


def test_the_cache_folder_is_the_environments(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("FLASHLAB_CACHE", "/mine")
    assert auto.cache_folder() == Path("/mine")
    monkeypatch.delenv("FLASHLAB_CACHE")
    assert auto.cache_folder() == Path("/xdg/flashlab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert auto.cache_folder() == Path("/home/someone/.cache/flashlab")


@pytest.mark.parametrize(
    ("name", "capability", "source"),
    [
        ("NVIDIA A", (9, 0), "measured on NVIDIA A: head_dim 64, length 2048"),
        ("NVIDIA B", (9, 0), "measured on NVIDIA A: head_dim 64, length 2048"),  # same compute capability
        ("NVIDIA C", (10, 0), "measured on NVIDIA C: head_dim 64, length 2048"),
        ("NVIDIA D", (8, 0), auto.NOT_MEASURED),
    ],
)
def test_a_gpu_takes_the_shipped_table_of_its_name_or_its_kind(name, capability, source, monkeypatch, tmp_path, call):
    (tmp_path / "a.json").write_text(table(*ROWS, device="NVIDIA A", capability="9.0"))
    (tmp_path / "c.json").write_text(table(*ROWS, device="NVIDIA C", capability="10.0"))
    monkeypatch.setattr(auto, "SHIPPED", tmp_path)
    monkeypatch.setattr(backends, "why_not", lambda name, spec: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert auto.choose(call()).source == source


def test_shipped_tables_are_whole():
    for path in auto.SHIPPED.glob("*.json"):
        found = auto.parse(path.read_text())
        assert found.capability
        assert {(cell.mask, cell.needs_grad) for cell in found.cells} == {
            (mask, needs_grad) for mask in ("full", "causal") for needs_grad in (False, True)
        }
        assert {name for cell in found.cells for name in cell.ranking} <= set(backends.BACKENDS)
