"""`flashlab doctor`: what this machine has, what will be used, and what is wrong, with the remedy."""

import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Literal

from flashlab.machine import Facts, examine

MIN_SHM_MIB = 1024
MIN_DISK_GB = 5
# The oldest driver for any release of a CUDA major version. Source: CUDA's release notes, "minor version compatibility"
MIN_DRIVER = {12: 525, 13: 580}
# Without FORCE_BUILD its setup may fetch a wheel built for another torch, without --no-cache-dir pip reuse its own.
COMPILE_FLASH_ATTN = (
    "FLASH_ATTENTION_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall "
    "flash-attn==2.8.3.post2"
)


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it; an "error" makes training impossible."""

    severity: Literal["error", "warning"]
    problem: str
    remedy: str


def doctor(*, json: bool = False, path: Path = Path()) -> int:
    """Say what this machine has, what will be used, and what is wrong with it.

    Args:
        json: Print one JSON object instead of the table.
        path: Folder that data and runs will be written to; its disk is looked at.

    Returns:
        0, or 1 if something makes training impossible.
    """
    facts = examine(path)
    problems = diagnose(facts)
    if json or importlib.util.find_spec("rich") is None:
        print(dumps({**facts, "problems": [asdict(problem) for problem in problems]}, indent=2))
    else:
        _print(facts, problems)
    return int(any(problem.severity == "error" for problem in problems))


def diagnose(facts: Facts) -> list[Problem]:
    """Turn facts into problems, the worst first."""
    problems: list[Problem] = []
    for judge in JUDGES:
        with suppress(KeyError):  # a section that could not be read is judged by the last
            problems += judge(facts)
    return sorted(problems, key=lambda problem: problem.severity)


def _judge_python(facts: Facts) -> Iterator[Problem]:
    python = facts["python"]
    if python["required"] is None:
        yield Problem("warning", "flashlab is not installed, so nothing checks its pins", "pip install -e .")
    elif not python["fits"]:
        yield Problem(
            "error",
            f"Python {python['version']} ({python['executable']}) is not {python['required']}, which flashlab needs",
            "make a new environment: python3.12 -m venv .venv",
        )


def _judge_packages(facts: Facts) -> Iterator[Problem]:
    unfit = {name: package for name, package in facts["packages"].items() if not package["fits"]}
    missing = [name + package["required"] for name, package in unfit.items() if package["version"] is None]
    if missing:
        yield Problem("error", f"packages are missing: {', '.join(missing)}", _pip_install(missing))
    wrong = {f"{name} {package['version']}": name + package["required"] for name, package in unfit.items()}
    wrong = {have: want for have, want in wrong.items() if want not in missing}
    if wrong:
        yield Problem("warning", f"not the pinned version: {', '.join(wrong)}", _pip_install(wrong.values()))


def _pip_install(requirements: Iterable[str]) -> str:
    return " ".join(["pip install", *(f"'{requirement}'" for requirement in requirements)])


def _judge_torch(facts: Facts) -> Iterator[Problem]:
    torch, torchvision = facts["torch"], facts["torchvision"]
    if torch["version"] is None:
        return  # stands among the missing packages
    if torch["error"]:
        reinstall = f"pip install --force-reinstall 'torch=={_release(torch)}'"
        yield Problem("error", f"torch {torch['version']} cannot be imported: {torch['error']}", reinstall)
    elif torchvision and torchvision["error"]:
        yield Problem(
            "error",
            f"torchvision {torchvision['version']} does not match torch {torch['version']} and breaks the import of "
            f"torchmetrics: {torchvision['error']}",
            "pip uninstall torchvision  (nothing here needs it; litdata lists it for images only)",
        )


def _release(torch: Facts) -> str:
    return torch["version"].partition("+")[0]  # without the build, as in 2.13.0+cpu


def _judge_gpu(facts: Facts) -> Iterator[Problem]:
    torch, driver, in_container = facts["torch"], facts["driver"], facts["environment"]["container"]
    if driver["error"]:
        yield Problem(
            "warning",
            f"nvidia-smi fails: {driver['error']}",
            "restart the machine: after an update, NVIDIA's kernel module and its libraries must be of one version",
        )
    elif torch["error"]:
        return  # nothing to compare with
    elif torch["gpus"]:
        for gpu in torch["gpus"] if torch["cuda"] else []:
            if not _has_kernels(torch["architectures"], gpu["capability"]):
                yield Problem(
                    "warning",
                    f"torch {torch['version']} has no kernels for {gpu['name']} (capability {gpu['capability']}), only "
                    f"for {', '.join(torch['architectures'])}",
                    "install torch built for another CUDA; until then hide the GPU: export CUDA_VISIBLE_DEVICES=''",
                )
    elif driver["gpus"]:
        yield _why_torch_sees_no_gpu(torch, driver, facts["environment"]["CUDA_VISIBLE_DEVICES"])
    elif (driver["on_bus"] or driver["kernel_module"]) and in_container:
        remedy = "start it with `docker run --gpus all`; the host needs the NVIDIA Container Toolkit"
        yield Problem("warning", "the host has an NVIDIA GPU that this container does not see", remedy)
    elif driver["on_bus"]:
        remedy = "install NVIDIA's driver (it brings nvidia-smi) and restart"
        yield Problem("warning", "this machine has an NVIDIA GPU and no driver for it", remedy)


def _why_torch_sees_no_gpu(torch: Facts, driver: Facts, visible: str | None) -> Problem:
    gpu = driver["gpus"][0]["name"]
    if torch["cuda"] is None:
        reinstall = f"pip install --force-reinstall 'torch=={_release(torch)}'  (from an index with builds for CUDA)"
        return Problem("warning", f"{gpu} is here, but torch {torch['version']} was built without CUDA", reinstall)
    needed = MIN_DRIVER.get(_major(torch["cuda"]), 0)
    if _major(driver["version"]) < needed:
        return Problem(
            "warning",
            f"driver {driver['version']} is too old for CUDA {torch['cuda']}, which torch was built for",
            f"update NVIDIA's driver to {needed} or newer, or install torch built for an older CUDA",
        )
    first = visible.split(",")[0] if visible is not None else "0"  # CUDA reads the list up to the first it cannot use
    if not first.startswith(("GPU-", "MIG-")) and not (first.isdigit() and int(first) < len(driver["gpus"])):
        return Problem("warning", f"CUDA_VISIBLE_DEVICES={visible!r} hides {gpu}", "unset CUDA_VISIBLE_DEVICES")
    return Problem(
        "warning",
        f"nvidia-smi sees {gpu}, torch does not: {torch['said'] or 'it does not say why'}",
        "restart the container, then the machine; in a container check that it was started with --gpus all",
    )


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _has_kernels(architectures: list[str], capability: str) -> bool:
    """Say whether binaries (sm_90: its major version, from that minor on) or PTX (compute_90: all later) fit a GPU."""
    gpu = tuple(map(int, capability.split(".")))
    for architecture in architectures:
        kind, digits = architecture.rstrip("af").split("_")
        built = int(digits[:-1]), int(digits[-1])
        if built <= gpu and (kind == "compute" or built[0] == gpu[0]):
            return True
    return False


def _judge_flash_attn(facts: Facts) -> Iterator[Problem]:
    flash, torch = facts["flash_attn"]["2"], facts["torch"]
    if flash["error"] and not torch["error"]:
        yield Problem(
            "warning",
            f"flash-attn {flash['version']} does not load with torch {torch['version']}: {flash['error']}",
            f"compile it for this torch (needs nvcc and torch <= 2.12): {COMPILE_FLASH_ATTN}",
        )


def _judge_shm(facts: Facts) -> Iterator[Problem]:
    shm, in_container = facts["shm"], facts["environment"]["container"]
    if shm and shm["size_mib"] < MIN_SHM_MIB:
        problem = f"/dev/shm holds {shm['size_mib']} MiB; data loader workers want {MIN_SHM_MIB}"
        remedy = "start the container with --shm-size=2g (compose: shm_size: 2gb)"
        yield Problem("warning", problem, remedy if in_container else "sudo mount -o remount,size=2G /dev/shm")


def _judge_disk(facts: Facts) -> Iterator[Problem]:
    disk = facts["disk"]
    if not disk["writable"]:
        yield Problem("error", f"{disk['path']} cannot be written", "permit writing there, or work in another folder")
    if disk["free_gb"] < MIN_DISK_GB:
        problem = f"{disk['free_gb']} GB are free at {disk['path']}; data and checkpoints want {MIN_DISK_GB} GB"
        yield Problem("warning", problem, "free space, or keep data and runs on another disk")


def _judge_caches(facts: Facts) -> Iterator[Problem]:
    for variable, cache in facts["caches"].items():
        if not cache["writable"]:
            remedy = f"export {variable}={Path(tempfile.gettempdir()) / 'flashlab' / variable.lower()}"
            yield Problem("warning", f"the cache folder {cache['path']} cannot be written", remedy)


def _judge_user(facts: Facts) -> Iterator[Problem]:
    if facts["environment"]["user"] is None:
        yield Problem("warning", "this user id has no name, and libraries ask for one", "export USER=flashlab")


def _judge_unread(facts: Facts) -> Iterator[Problem]:
    torch_is_broken = facts.get("torch", {}).get("error")
    for section, error in facts["unread"].items():
        if section != "will_use" or not torch_is_broken:  # which says it already
            yield Problem("warning", f"could not find out about {section}: {error}", "the rest of the report holds")


JUDGES = (
    _judge_python,
    _judge_packages,
    _judge_torch,
    _judge_gpu,
    _judge_flash_attn,
    _judge_shm,
    _judge_disk,
    _judge_caches,
    _judge_user,
    _judge_unread,
)


def _print(facts: Facts, problems: list[Problem]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for label, line in LINES.items():
        try:
            table.add_row(label, Text(line(facts)))
        except KeyError:
            table.add_row(label, "unknown")
    console.print(table)
    console.print()
    if not problems:
        console.print("No problems found.", style="green")
    for problem in problems:
        style = "bold red" if problem.severity == "error" else "bold yellow"
        console.print(Text.assemble((problem.severity, style), f": {problem.problem}"))
        console.print(Text(f"  {problem.remedy}"), soft_wrap=True)  # a command is copied: no line breaks in it


def _torch_line(facts: Facts) -> str:
    torch = facts["torch"]
    if torch["error"]:
        return f"{torch['version'] or 'not installed'}: cannot be imported"
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['rocm']}" if torch["rocm"] else "no CUDA"
    return f"{torch['version']}, built with {build}"


def _gpu_line(facts: Facts) -> str:
    names = Counter(
        f"{gpu['name']} ({gpu['memory_gib']} GiB, capability {gpu['capability'] or 'unknown'})"
        for gpu in facts["torch"].get("gpus") or facts["driver"]["gpus"]
    )
    counted = [f"{count} x {name}" for name, count in names.items()]
    return ", ".join([*counted, f"driver {facts['driver']['version']}"]) if counted else "none"


def _flash_attn_line(facts: Facts) -> str:
    found = [
        variant["version"] or f"{name} (version unknown)"
        for name, variant in facts["flash_attn"].items()
        if variant["found"]
    ]
    return ", ".join(found) or "not installed"


LINES: dict[str, Callable[[Facts], str]] = {
    "flashlab": lambda facts: f"{facts['flashlab']} on {facts['environment']['system']}",
    "Python": lambda facts: "{version} ({executable})".format(**facts["python"]),
    "torch": _torch_line,
    "GPU": _gpu_line,
    "flash-attn": _flash_attn_line,
    "packages": lambda facts: ", ".join(f"{name} {package['version']}" for name, package in facts["packages"].items()),
    "CPU": lambda facts: "{model}, {usable_cores} of {cores} cores usable".format(**facts["cpu"]),
    "memory": lambda facts: "{usable_gib} GiB, {available_gib} GiB of it free".format(**facts["memory"]),
    "/dev/shm": lambda facts: "{size_mib} MiB".format(**facts["shm"]) if facts["shm"] else "none",
    "disk": lambda facts: "{free_gb} GB free at {path}".format(**facts["disk"]),
    "will use": lambda facts: "{device}, {precision}, attention {attention}".format(**facts["will_use"]),
}
