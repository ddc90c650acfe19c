import sys

import pytest
import torch

from flashlab.attention import flash


@pytest.fixture
def flash_attn_package(tmp_path, monkeypatch):
    """Stand in for an installed flash-attn whose files are given."""
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    flash.import_problem.cache_clear()

    def install(**files):
        (tmp_path / "flash_attn").mkdir()
        for name, text in {"__init__": "", **files}.items():
            (tmp_path / "flash_attn" / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]
    flash.import_problem.cache_clear()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cpu")}, "it needs a CUDA device; the inputs are on cpu"),
        ({"dtype": torch.float32}, "it computes in float16 or bfloat16 only; the inputs are float32"),
        ({"head_dim": 264}, "it takes head_dim up to 256; got 264"),
        ({"head_dim": 12}, "it takes head_dim in multiples of 8; got 12"),
    ],
)
def test_refuses_with_a_reason(changes, reason, make_spec):
    assert flash.why_not(2, make_spec(**{"device": torch.device("cuda")} | changes)) == reason


def test_flash_attention_4_alone_is_not_flash_attention_2(flash_attn_package, make_spec):
    flash_attn_package(cute="")
    assert "flash-attn 2 is not installed" in flash.why_not(2, make_spec(device=torch.device("cuda")))


def test_an_abi_mismatch_is_named(flash_attn_package, make_spec):
    flash_attn_package(flash_attn_interface="raise ImportError('undefined symbol: _ZN3c105Error')")
    reason = flash.why_not(2, make_spec(device=torch.device("cuda")))
    assert f"does not load with torch {torch.__version__}: undefined symbol: _ZN3c105Error" in reason
    assert "flashlab doctor" in reason


def test_a_missing_extension_is_named(flash_attn_package, make_spec):
    flash_attn_package(flash_attn_interface="import flash_attn_2_cuda_missing")
    reason = flash.why_not(2, make_spec(device=torch.device("cuda")))
    assert "flash-attn 2 lacks its module flash_attn_2_cuda_missing" in reason


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        (2, (7, 5), "it needs an Ampere GPU or newer (compute capability 8.0); this one has 7.5"),
        (2, (9, 0), None),
        (3, (8, 0), "it needs a Hopper GPU or newer (compute capability 9.0); this one has 8.0"),
        (3, (9, 0), None),
        (3, (10, 0), "it is made for Hopper alone (compute capability 9.0); this one has 10.0"),
        (4, (8, 9), "it needs a Hopper GPU or newer (compute capability 9.0); this one has 8.9"),
        (4, (10, 0), None),
    ],
)
def test_each_version_has_its_gpus(version, capability, reason, make_spec, monkeypatch):
    monkeypatch.setattr(flash, "import_problem", lambda version: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert flash.why_not(version, make_spec(device=torch.device("cuda"))) == reason
