import json
import os
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flashlab import machine
from flashlab.cli import main
from flashlab.doctor import diagnose

H200 = {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8}
HEALTHY = {
    "unread": {},
    "flashlab": "0.1.0",
    "python": {"version": "3.12.3", "executable": "/venv/bin/python", "required": ">=3.11", "fits": True},
    "packages": {"lightning": {"version": "2.6.6", "required": "==2.6.6", "fits": True}},
    "torch": {
        "version": "2.11.0+cu130",
        "error": None,
        "cuda": "13.0",
        "rocm": None,
        "cudnn": 91900,
        "architectures": ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"],
        "gpus": [H200],
        "said": None,
    },
    "driver": {"version": "580.159.03", "error": None, "gpus": [H200], "kernel_module": True, "on_bus": 1},
    "flash_attn": {
        "2": {"found": True, "version": "2.8.3.post2", "error": None},
        "3": {"found": False, "version": None, "error": None},
        "4": {"found": True, "version": "4.0.0b36", "error": None},
    },
    "torchvision": None,
    "cpu": {"model": "Xeon", "cores": 64, "usable_cores": 16},
    "memory": {"total_gib": 512.0, "usable_gib": 128.0, "available_gib": 120.5},
    "shm": {"size_mib": 8192},
    "disk": {"path": "/work", "free_gb": 120.0, "writable": True},
    "caches": {"TRITON_CACHE_DIR": {"path": "/home/me/.triton", "writable": True}},
    "environment": {"system": "Linux 6.8 x86_64", "user": "me", "container": False, "CUDA_VISIBLE_DEVICES": None},
    "will_use": {"device": "cuda", "precision": "bf16-mixed", "attention": "flash_attention_2"},
}


def facts_with(**changes):
    """Copy the healthy facts; `section__key=value` changes one."""
    facts = deepcopy(HEALTHY)
    for name, value in changes.items():
        *sections, key = name.split("__")
        part = facts
        for section in sections:
            part = part[section]
        part[key] = value
    return facts


@pytest.fixture
def doctor(capsys):
    """Run the command; return its exit code and its JSON."""

    def run(*arguments):
        code = main(["doctor", "--json", *arguments])
        captured = capsys.readouterr()
        assert captured.err == ""
        return code, json.loads(captured.out)

    return run


@pytest.fixture
def healthy(monkeypatch):
    """Let the command see the healthy machine, changed as asked."""

    def see(**changes):
        monkeypatch.setattr("flashlab.doctor.examine", lambda path: facts_with(**changes))

    return see


def test_a_healthy_machine_has_no_problems():
    assert diagnose(HEALTHY) == []


SEES_NONE = {"torch__gpus": [], "torch__architectures": []}


@pytest.mark.parametrize(
    ("changes", "severity", "problem", "remedy"),
    [
        (
            {"python__version": "3.10.2", "python__fits": False},
            "error",
            "Python 3.10.2 (/venv/bin/python) is not >=3.11",
            "python3.12 -m venv",
        ),
        ({"python__required": None}, "warning", "flashlab is not installed", "pip install -e ."),
        (
            {"packages__lightning__version": None, "packages__lightning__fits": False},
            "error",
            "packages are missing: lightning==2.6.6",
            "pip install 'lightning==2.6.6'",
        ),
        (
            {"packages__lightning__version": "2.5.0", "packages__lightning__fits": False},
            "warning",
            "not the pinned version: lightning 2.5.0",
            "pip install 'lightning==2.6.6'",
        ),
        (
            {"torch__error": "ImportError: libcudart.so.13: cannot open shared object file"},
            "error",
            "torch 2.11.0+cu130 cannot be imported: ImportError: libcudart",
            "pip install --force-reinstall 'torch==2.11.0'",
        ),
        (
            {"torchvision": {"version": "0.25.0", "error": "RuntimeError: operator torchvision::nms does not exist"}},
            "error",
            "torchvision 0.25.0 does not match torch 2.11.0+cu130",
            "pip uninstall torchvision",
        ),
        (
            {**SEES_NONE, "torch__cuda": None, "torch__version": "2.11.0+cpu"},
            "warning",
            "NVIDIA H200 is here, but torch 2.11.0+cpu was built without CUDA",
            "pip install --force-reinstall 'torch==2.11.0'",
        ),
        (
            {**SEES_NONE, "driver__version": "535.104.05"},
            "warning",
            "driver 535.104.05 is too old for CUDA 13.0",
            "update NVIDIA's driver to 580 or newer",
        ),
        (
            {**SEES_NONE, "environment__CUDA_VISIBLE_DEVICES": ""},
            "warning",
            "CUDA_VISIBLE_DEVICES='' hides NVIDIA H200",
            "unset CUDA_VISIBLE_DEVICES",
        ),
        (
            {**SEES_NONE, "environment__CUDA_VISIBLE_DEVICES": "0", "torch__said": "Error 802: system not ready"},
            "warning",
            "nvidia-smi sees NVIDIA H200, torch does not: Error 802: system not ready",
            "restart the container, then the machine",
        ),
        (
            {**SEES_NONE, "driver__gpus": [], "environment__container": True},
            "warning",
            "the host has an NVIDIA GPU that this container does not see",
            "docker run --gpus all",
        ),
        (
            {**SEES_NONE, "driver__gpus": [], "driver__kernel_module": False},
            "warning",
            "this machine has an NVIDIA GPU and no driver for it",
            "install NVIDIA's driver",
        ),
        (
            {**SEES_NONE, "driver__gpus": [], "driver__error": "Driver/library version mismatch"},
            "warning",
            "nvidia-smi fails: Driver/library version mismatch",
            "restart the machine",
        ),
        (
            {"torch__gpus": [{"name": "Tesla V100", "capability": "7.0", "memory_gib": 32}]},
            "warning",
            "torch 2.11.0+cu130 has no kernels for Tesla V100 (capability 7.0), only for sm_75",
            "install torch built for another CUDA",
        ),
        (
            {"flash_attn__2__error": "ImportError: undefined symbol: _ZN3c105ErrorC2E"},
            "warning",
            "flash-attn 2.8.3.post2 does not load with torch 2.11.0+cu130: ImportError: undefined symbol",
            "FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps --no-cache-dir",
        ),
        ({"shm": {"size_mib": 64}}, "warning", "/dev/shm holds 64 MiB", "sudo mount -o remount,size=2G /dev/shm"),
        (
            {"shm": {"size_mib": 64}, "environment__container": True},
            "warning",
            "/dev/shm holds 64 MiB",
            "--shm-size=2g (compose: shm_size: 2gb)",
        ),
        ({"disk__free_gb": 4.9}, "warning", "4.9 GB are free at /work", "free space"),
        ({"disk__writable": False}, "error", "/work cannot be written", "another folder"),
        (
            {"caches__TRITON_CACHE_DIR__writable": False},
            "warning",
            "the cache folder /home/me/.triton cannot be written",
            "export TRITON_CACHE_DIR=",
        ),
        ({"environment__user": None}, "warning", "this user id has no name", "export USER="),
        ({"unread": {"memory": "OSError: no"}}, "warning", "could not find out about memory: OSError: no", "holds"),
    ],
)
def test_each_problem_is_the_only_one_and_names_its_remedy(changes, severity, problem, remedy, healthy, doctor):
    healthy(**changes)
    code, said = doctor()
    (found,) = said["problems"]
    assert found["severity"] == severity
    assert found["problem"].startswith(problem)
    assert remedy in found["remedy"]
    assert code == (1 if severity == "error" else 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "fits"),
    [
        (["sm_80", "sm_90"], "8.6", True),
        (["sm_86"], "8.0", False),
        (["sm_90a"], "9.0", True),
        (["sm_80", "sm_90"], "12.0", False),
        (["sm_90", "compute_90"], "12.0", True),
    ],
)
def test_which_binaries_run_on_which_gpu(architectures, capability, fits):
    gpu = {"name": "GPU", "capability": capability, "memory_gib": 8}
    assert fits == (diagnose(facts_with(torch__architectures=architectures, torch__gpus=[gpu])) == [])


def test_sections_that_could_not_be_read_leave_the_others_standing():
    for section in HEALTHY.keys() - {"unread", "flashlab"}:
        facts = facts_with(unread={section: "OSError: no"}, disk__free_gb=1.0)
        del facts[section]
        problems = [problem.problem for problem in diagnose(facts)]
        assert f"could not find out about {section}: OSError: no" in problems
        assert section == "disk" or any(problem.startswith("1.0 GB are free") for problem in problems)


def test_the_table_fits_80_columns_and_commands_stay_whole(healthy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    healthy(**{"flash_attn__2__error": "ImportError: undefined symbol", "disk__free_gb": 1.0})
    assert main(["doctor", "--path", "."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("1 x NVIDIA H200 (139.8 GiB, capability 9.0), driver 580.159.03" in line for line in lines)
    assert any("2.8.3.post2, 4.0.0b36" in line for line in lines)
    assert any(line.startswith("will use    cuda, bf16-mixed, attention flash_attention_2") for line in lines)
    assert any(line.endswith("--force-reinstall flash-attn==2.8.3.post2") for line in lines)
    assert all(len(line) <= 80 or line.startswith("  ") for line in lines)


# The machine itself: what `examine` reads, with faults put in.


def test_this_machine_is_described(doctor, tmp_path):
    import torch

    _, said = doctor("--path", str(tmp_path / "not" / "yet"))
    assert said["unread"] == {}
    assert said["torch"]["version"] == torch.__version__
    assert said["disk"]["path"] == str(tmp_path)
    assert said["cpu"]["usable_cores"] <= said["cpu"]["cores"]
    assert 0 < said["memory"]["available_gib"] <= said["memory"]["usable_gib"] <= said["memory"]["total_gib"]
    if not torch.cuda.is_available():
        assert said["will_use"] == {"device": "cpu", "precision": "32-true", "attention": "sdpa_flash"}


def test_torch_that_cannot_be_imported_is_one_finding(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    code, said = doctor()
    assert code == 1
    about_torch = [problem for problem in said["problems"] if "torch" in problem["problem"]]
    assert [problem["severity"] for problem in about_torch] == ["error"]
    assert "cannot be imported" in about_torch[0]["problem"]
    assert main(["doctor", "--path", "."]) == 1  # and the table prints


def test_every_section_may_fail(doctor, monkeypatch):
    def fail(*args):
        raise OSError("no such thing")

    for name in ("_python", "_packages", "_torch", "_driver", "_flash_attn", "_torchvision", "_cpu", "memory", "_shm"):
        monkeypatch.setattr(machine, name, fail)
    for name in ("_disk", "_caches", "_environment", "_will_use"):
        monkeypatch.setattr(machine, name, fail)
    code, said = doctor()
    assert code == 0
    assert len(said["problems"]) == 13
    assert main(["doctor", "--path", "."]) == 0


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    def install(script):
        command = tmp_path / "bin" / "nvidia-smi"
        command.parent.mkdir()
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")

    return install


def test_nvidia_smi_is_read(nvidia_smi):
    nvidia_smi("echo '580.159.03, NVIDIA H200, 143771'; echo '580.159.03, NVIDIA H200, [N/A]'")
    driver = machine._driver()
    assert driver["version"] == "580.159.03"
    assert [gpu["memory_gib"] for gpu in driver["gpus"]] == [140.4, None]


def test_nvidia_smi_that_fails_is_quoted(nvidia_smi):
    nvidia_smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    assert machine._driver()["error"] == "Failed to initialize NVML: Driver/library version mismatch"


def test_limits_of_the_container_count(monkeypatch, tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory.max").write_text(str(3 * machine.GIB))
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(3 * machine.GIB))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu.max").write_text("150000 100000")
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * 2**30, available=50 * 2**30))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.memory() == {"total_gib": 64.0, "usable_gib": 3.0, "available_gib": 3.0}
    assert machine.usable_cores() == machine._cpu()["usable_cores"] == 1


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="no /dev/shm here")
def test_a_full_disk_and_a_small_shm_are_seen(doctor, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 * 2**20, free=10**9))
    problems = {problem["problem"] for problem in doctor()[1]["problems"]}
    assert any(problem.startswith("/dev/shm holds 64 MiB") for problem in problems)
    assert any(problem.startswith("1.0 GB are free") for problem in problems)


def test_folders_that_cannot_be_written_are_seen(doctor, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    look = os.stat

    def stat(path, **options):
        if str(path).startswith(str(tmp_path / "runs")):
            raise PermissionError
        return look(path, **options)

    monkeypatch.setattr("os.stat", stat)
    code, said = doctor("--path", str(tmp_path / "runs"))
    problems = {problem["problem"]: problem["remedy"] for problem in said["problems"]}
    assert f"{tmp_path} cannot be written" in problems
    assert "export TRITON_CACHE_DIR=" in problems[f"the cache folder {tmp_path / 'triton'} cannot be written"]
    assert code == 1


def test_broken_extensions_are_seen(doctor, monkeypatch, tmp_path):
    for package, module, text in (
        ("torchvision", "__init__", "raise RuntimeError('operator torchvision::nms does not exist')"),
        ("flash_attn", "__init__", "from flash_attn import flash_attn_interface"),
        ("flash_attn", "flash_attn_interface", "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')"),
        ("flash_attn", "cute", ""),
        ("cutlass", "__init__", ""),
    ):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / f"{module}.py").write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
    information = tmp_path / "torchvision-0.1.0.dist-info" / "METADATA"
    information.parent.mkdir()
    information.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\nRequires-Dist: torch==1.2.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    code, said = doctor()
    assert code == 1
    assert said["flash_attn"]["4"]["found"]
    assert not said["flash_attn"]["3"]["found"]
    remedies = " ".join(problem["remedy"] for problem in said["problems"])
    assert "pip uninstall torchvision" in remedies
    assert "flash-attn==2.8.3.post2" in remedies
