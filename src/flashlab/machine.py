"""What this machine has: facts, read section by section and judged by nobody (`doctor` does that)."""

import getpass
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from flashlab import __version__
from flashlab.errors import UserError, check_writable, one_line, write_text

Facts = dict[str, Any]

GIB = 2**30
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# flash-attn's variants: the modules that prove each, and its distribution. flash-attn 2 may hold a folder `cute` too.
FLASH_ATTN = {
    "2": (["flash_attn.flash_attn_interface"], "flash-attn"),
    "3": (["flash_attn_interface"], "flash_attn_3"),
    "4": (["flash_attn.cute", "cutlass"], "flash-attn-4"),
}
# Where libraries keep caches: the variable that moves each, and its default.
CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": tempfile.gettempdir(),
    "TRITON_CACHE_DIR": "~/.triton",
    "MPLCONFIGDIR": "~/.config/matplotlib",
    "KAGGLEHUB_CACHE": "~/.cache/kagglehub",
    "LITDATA_CACHE_DIR": "~/.lightning/chunks",
}


def examine(path: Path) -> Facts:
    """Read the facts, section by section; `unread` names those that failed."""
    sections: dict[str, Callable[[], Any]] = {
        "flashlab": lambda: __version__,
        "python": _python,
        "packages": _packages,
        "torch": _torch,
        "driver": _driver,
        "flash_attn": _flash_attn,
        "torchvision": _torchvision,
        "cpu": _cpu,
        "memory": memory,
        "shm": _shm,
        "disk": lambda: _disk(path),
        "caches": _caches,
        "environment": _environment,
        "will_use": _will_use,
    }
    facts: Facts = {"unread": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a library's warning would stand in the middle of the table
        for name, read in sections.items():
            try:
                facts[name] = read()
            except Exception as error:  # whatever is broken here, the rest of the machine is still worth a look
                facts["unread"][name] = one_line(error)
    return facts


def identify() -> Facts:
    """Read the facts that a result must carry to be understood elsewhere: versions and hardware, no paths, no user."""
    facts = examine(Path())
    kept = ("flashlab", "packages", "torch", "driver", "flash_attn", "cpu", "memory", "will_use")
    return {name: facts[name] for name in kept if name in facts} | {"python": platform.python_version()}


def provenance(kind: str) -> Facts:
    """Say what a result file is and where it comes from; every result file begins with this."""
    return {
        "schema": 1,
        "kind": kind,
        "command": shlex.join(["flashlab", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "image": os.environ.get("FLASHLAB_IMAGE"),
        "machine": identify(),
    }


def check_result(path: Path) -> None:
    """Make sure that --out names a result file that can be written, with its picture beside it, before the work.

    Raises:
        UserError: its name does not end in .json, or it cannot be written.
    """
    if path.suffix != ".json":  # the picture's name is this one with another ending
        raise UserError(f"--out {path}: the result is JSON; name a file that ends in .json")
    check_writable("--out", path)


def write_result(path: Path, record: Facts) -> None:
    """Write a result file, each of its rows on a line of its own.

    Raises:
        UserError: the file system refuses it.
    """
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    facts = json.dumps({name: value for name, value in record.items() if name != "rows"}, indent=1).removesuffix("\n}")
    write_text(path, f'{facts},\n "rows": [\n  {rows}\n ]\n}}\n' if rows else f'{facts},\n "rows": []\n}}\n')


def git_commit() -> str | None:
    """Return the commit of a checkout, or the one that an image was built from (FLASHLAB_COMMIT)."""
    if commit := os.environ.get("FLASHLAB_COMMIT"):
        return commit
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Facts:
    """Read Python's version, and the versions that flashlab asks for (nothing while it is not installed)."""
    from packaging.specifiers import SpecifierSet

    version, required = platform.python_version(), None
    if _version("flashlab"):
        required = metadata.metadata("flashlab")["Requires-Python"]
    fits = SpecifierSet(required or "").contains(version, prereleases=True)
    return {"version": version, "executable": sys.executable, "required": required, "fits": fits}


def _packages() -> Facts:
    """Read the version of each direct dependency, and the version that flashlab asks for."""
    from packaging.requirements import Requirement

    packages = {}
    for line in (metadata.requires("flashlab") or []) if _version("flashlab") else []:
        asked = Requirement(line)
        if asked.marker is None:  # the others belong to extras
            version = _version(asked.name)
            fits = version is not None and asked.specifier.contains(version, prereleases=True)
            packages[asked.name] = {"version": version, "required": str(asked.specifier), "fits": fits}
    return packages


def _torch() -> Facts:
    try:
        import torch
    except Exception as error:
        return {"version": _version("torch"), "error": one_line(error)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sees_gpu = torch.cuda.is_available()
    gpus = []
    for index in range(torch.cuda.device_count() if sees_gpu else 0):
        gpu = torch.cuda.get_device_properties(index)
        capability, memory_gib = f"{gpu.major}.{gpu.minor}", round(gpu.total_memory / GIB, 1)
        gpus.append({"name": gpu.name, "capability": capability, "memory_gib": memory_gib})
    return {
        "version": torch.__version__,
        "error": None,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "architectures": torch.cuda.get_arch_list(),
        "gpus": gpus,
        "said": " ".join(str(caught[0].message).split()) if caught else None,
    }


def _driver() -> Facts:
    """Ask nvidia-smi, which works without torch; without it, look for traces of a GPU."""
    kernel_module = Path("/proc/driver/nvidia/version").exists()
    pci = [
        vendor.parent for vendor in Path("/sys/bus/pci/devices").glob("*/vendor") if vendor.read_text()[:6] == "0x10de"
    ]
    on_bus = sum((device / "class").read_text().startswith("0x03") for device in pci)  # 03: display controllers
    facts: Facts = {"version": None, "error": None, "gpus": [], "kernel_module": kernel_module, "on_bus": on_bus}
    if shutil.which("nvidia-smi") is None:
        return facts
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {**facts, "error": one_line(error)}
    if answer.returncode != 0:
        return {**facts, "error": " ".join((answer.stdout + answer.stderr).split())}
    for line in answer.stdout.splitlines():
        facts["version"], name, mebibytes = (cell.strip() for cell in line.split(","))
        memory_gib = round(int(mebibytes) / 1024, 1) if mebibytes.isdigit() else None
        facts["gpus"].append({"name": name, "capability": None, "memory_gib": memory_gib})
    return facts


def _is_installed(module: str) -> bool:
    """Find a module's file without importing its package."""
    package, _, inner = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inner:
        return spec is not None
    paths = [Path(folder) / inner for folder in spec.submodule_search_locations or []]
    return any(path.is_dir() or path.with_suffix(".py").exists() for path in paths)


def _flash_attn() -> Facts:
    """Find flash-attn's variants by their modules' files: importing the newer ones takes seconds."""
    facts: Facts = {}
    for variant, (modules, distribution) in FLASH_ATTN.items():
        found = all(map(_is_installed, modules))
        facts[variant] = {"found": found, "version": _version(distribution) if found else None, "error": None}
    if facts["2"]["found"]:  # the one that is compiled against torch, and fails when torch changes
        try:
            import_module("flash_attn.flash_attn_interface")
        except Exception as error:
            facts["2"]["error"] = one_line(error)
    return facts


def _torchvision() -> Facts | None:
    """Read torchvision's version, and import it (seconds) where it may not be the one that belongs to torch."""
    from packaging.requirements import Requirement

    version, torch_version = _version("torchvision"), _version("torch")
    if version is None or torch_version is None:
        return None
    asked = [Requirement(line) for line in metadata.requires("torchvision") or []]
    fits = any(each.name == "torch" and each.specifier.contains(torch_version, prereleases=True) for each in asked)
    same_build = version.partition("+")[2] == torch_version.partition("+")[2]  # as in 2.13.0+cpu
    if fits and same_build:
        return {"version": version, "error": None}
    try:
        import_module("torchvision")
    except Exception as error:
        return {"version": version, "error": one_line(error)}
    return {"version": version, "error": None}


def _control_group(controller: str, file: str) -> list[list[str]]:
    """Read a file of this process's control group and of its parents, whose limits hold as well."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = CONTROL_GROUPS / controller if controllers else CONTROL_GROUPS  # cgroup v1: a tree for each; v2: one
        own = tree / group.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(tree) and (folder / file).exists():
                found.append((folder / file).read_text().split())
    return found


def _cpu() -> Facts:
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {"model": model, "cores": os.cpu_count() or 1, "usable_cores": usable_cores()}


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity and a container's limit count, at least 1."""
    limits = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)]
    with suppress(OSError):  # no control groups outside Linux
        v1 = zip(_control_group("cpu", "cpu.cfs_quota_us"), _control_group("cpu", "cpu.cfs_period_us"), strict=True)
        for quota, period in [*_control_group("cpu", "cpu.max"), *(q + p for q, p in v1)]:
            if quota not in ("max", "-1"):
                limits.append(int(quota) / int(period))
    return max(1, int(min(limits)))


def memory() -> Facts:
    """Return the memory of this machine, what of it a process may use, and what is free, in GiB."""
    import psutil

    virtual = psutil.virtual_memory()
    limits = [virtual.total]
    with suppress(OSError):
        files = _control_group("memory", "memory.max") + _control_group("memory", "memory.limit_in_bytes")
        limits += [int(limit) for (limit,) in files if limit != "max"]
    usable = min(limits)
    return {
        "total_gib": round(virtual.total / GIB, 1),
        "usable_gib": round(usable / GIB, 1),
        "available_gib": round(min(virtual.available, usable) / GIB, 1),
    }


def choose_device(asked: str) -> str:
    """Return "cuda" or "cpu".

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    import torch

    found = torch.cuda.is_available()
    if asked == "cuda" and not found:
        raise UserError("--device cuda: torch sees no CUDA device (`flashlab doctor` says why); use --device cpu")
    return ("cuda" if found else "cpu") if asked == "auto" else asked


def _shm() -> Facts | None:
    return {"size_mib": shutil.disk_usage("/dev/shm").total // 2**20} if Path("/dev/shm").exists() else None


def _disk(path: Path) -> Facts:
    folder = _nearest_existing(path)
    free_gb = round(shutil.disk_usage(folder).free / 1e9, 1)
    return {"path": str(folder), "free_gb": free_gb, "writable": os.access(folder, os.W_OK | os.X_OK)}


def _nearest_existing(path: Path) -> Path:
    absolute = path.expanduser().absolute()
    above = (absolute, *absolute.parents)  # in a folder, maybe, that one may not enter
    return next(folder for folder in above if os.path.isdir(folder))  # noqa: PTH112 - Path's raises there


def _caches() -> Facts:
    """Find the cache folder of each library."""
    folders = {variable: Path(os.environ.get(variable) or default) for variable, default in CACHES.items()}
    return {
        variable: {
            "path": str(folder.expanduser()),
            "writable": os.access(_nearest_existing(folder), os.W_OK | os.X_OK),
        }
        for variable, folder in folders.items()
    }


def _environment() -> Facts:
    user = None
    with suppress(KeyError, OSError):  # an arbitrary `docker run --user` has no name
        user = getpass.getuser()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "user": user,
        "container": any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _will_use() -> Facts:
    """Resolve what training a causal transformer takes here."""
    import torch

    from flashlab.attention import AttentionSpec, resolve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    spec = AttentionSpec(
        batch_size=1,
        seqlen_q=2048,
        seqlen_k=2048,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        device=torch.device(device),
        causal=True,
        needs_grad=True,
    )
    return {"device": device, "precision": "bf16-mixed" if bf16 else "32-true", "attention": resolve("auto", spec)}
