"""What the built images hold, and how containers of them behave.

All that works is run in the CPU image, which is smaller; the CUDA image is asked for what only it has.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
# Nobody that the image knows; files that it writes into `workspace` belong to whoever runs these tests.
USER = f"--user={os.getuid() or 12345}:{os.getgid()}"
HARDENED = ["--read-only", "--tmpfs=/tmp:exec", "--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
TRAIN = shlex.split(
    "train --config examples/btc_forecast/cpu.yaml --data.path data/tiny --data.context_length 32 --data.stride 8 "
    "--data.batch_size 4 --model.width 16 --model.num_layers 1 --model.num_heads 1 --trainer.log_every_n_steps 1 "
    "--trainer.val_every_n_steps 100000 --trainer.checkpoint_every_n_steps 20 --run runs/mine --trainer.max_steps"
)
FOREVER = "100000"

# Files that no layer may hold. Names are those of the archive, without a slash in front.
FORBIDDEN = re.compile(
    r"(^|/)(\.git|\.cache|\.aws|\.docker|\.ssh|__MACOSX)/|(^|/)(\.env|\.netrc|\.pypirc|pip\.conf|uv\.toml|id_(rsa|dsa|ecdsa|ed25519))$"
    r"|^(workspace|app)/(data|runs|wheels|tests)/|^var/(cache/|lib/apt/lists/|log/apt)[^/]|^tmp/.*[^/]$"
    r"|^(root|home/flashlab)/(?!\.(bashrc|profile|bash_logout)$)|^(opt/tools|lock|wheel|wheelhouse|package|sdist)/"
    r"|^(?!usr/lib/python3).*\.whl$"
)


@pytest.fixture(params=["cpu", "cu130"])
def image(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue({"cpu": "cpu_image", "cu130": "runtime_image"}[request.param])


@pytest.fixture
def mounts(workspace: Path) -> list[str]:
    return [f"--volume={workspace / name}:/workspace/{name}" for name in ("data", "runs")]


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.2)


def locked(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def lock_of(docker, image: str) -> dict[str, str]:
    return locked(
        docker("run", "--rm", "--entrypoint=cat", image, "/usr/local/share/flashlab/requirements.lock").stdout
    )


# What the images hold


def test_packages_are_those_of_the_lock(docker, image):
    docker("run", "--rm", image, "verify-lock", "/usr/local/share/flashlab/requirements.lock")
    code = (
        "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()), sep='\\n')"
    )
    installed = docker("run", "--rm", image, "python", "-c", code).stdout
    found = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in locked(installed).items()}
    expected = {name.lower().replace("_", "-").replace(".", "-"): v for name, v in lock_of(docker, image).items()}
    beside = {name: version for name, version in found.items() if expected.get(name) != version}
    assert expected.items() <= found.items()
    assert beside.keys() <= {"flashlab", "flash-attn", "pip", "setuptools"}
    assert ("flash-attn" in beside) == ("+cpu" not in expected["torch"])


def test_lock_in_the_cuda_image_is_the_projects(docker, runtime_image):
    lock = (ROOT / "assets/build/requirements-cu130-py312.lock").read_text()
    assert lock_of(docker, runtime_image) == locked(lock)


def test_labels_and_user(docker, image):
    variant = image.split(":")[1]
    (facts,) = json.loads(docker("image", "inspect", image).stdout)
    config = facts["Config"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"])
    assert config["Entrypoint"][0] == "tini"
    assert config["Entrypoint"][-1] == "entrypoint"
    assert config["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    assert config["WorkingDir"] == "/workspace"
    assert not config.get("ExposedPorts")
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == "FlashLab"
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == variant
    assert labels["base.name"]
    assert "revision" in labels
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment["FLASHLAB_IMAGE"] == f"flashlab:{variant}"
    assert environment["FLASHLAB_VARIANT"] in ("cpu-py312", "cu130-py312")
    history = docker("history", "--no-trunc", "--format={{.CreatedBy}}", image).stdout
    telling = re.compile(r"token|secret|passw|credential|api_?key|://[^/\s]*@|_proxy=", re.IGNORECASE)
    assert not telling.findall(history + json.dumps(config["Env"]))


def test_compiler_is_in_no_image_but_gcc_in_those_with_cuda(docker, image):
    programs = "gcc cc g++ c++ cc1plus nvcc cicc make ninja cmake git curl wget uv ssh sudo"
    found = docker("run", "--rm", image, "bash", "-c", f"for p in {programs}; do command -v $p; done; true")
    assert {Path(path).name for path in found.stdout.split()} == (set() if ":cpu-" in image else {"gcc", "cc"})


def test_gcc_compiles_what_triton_needs(docker, runtime_image):
    source = "#include <Python.h>\n#include <dlfcn.h>\nint main(void) { return 0; }"
    command = "gcc -shared -fPIC $(python3-config --includes 2>/dev/null || python -c "
    command += '\'import sysconfig; print("-I" + sysconfig.get_path("include"))\') -x c - -o /tmp/launcher.so'
    docker("run", "--rm", "--interactive", runtime_image, "bash", "-c", command, input=source)


def test_no_layer_holds_caches_or_secrets(docker, cpu_image):
    """Each layer above the base is looked at, and not only what is left of them at the end."""
    manifest, files = {}, {}
    with (
        subprocess.Popen(["docker", "save", cpu_image], stdout=subprocess.PIPE) as saving,
        tarfile.open(fileobj=saving.stdout, mode="r|") as archive,
    ):
        for blob in (entry for entry in archive if entry.isfile()):
            content = archive.extractfile(blob)
            if blob.name == "manifest.json":
                (manifest,) = json.load(content)
                continue
            with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=content, mode="r|") as layer:
                names = [entry.name.removeprefix("./") for entry in layer if not entry.isdir()]
                files[blob.name] = [name for name in names if "/.wh." not in name]  # which hide a file of the base
    base = docker("inspect", '--format={{index .Config.Labels "org.opencontainers.image.base.name"}}', cpu_image).stdout
    of_base = docker("image", "inspect", "--format={{len .RootFS.Layers}}", base.strip(), check=False)
    ours = manifest["Layers"][int(of_base.stdout) if of_base.returncode == 0 else 1 :]  # Ubuntu's image has one layer
    assert sum(len(files[layer]) for layer in ours) > 10_000
    assert [name for layer in ours for name in files[layer] if FORBIDDEN.search(name)] == []


def test_no_cache_or_secret_is_left(docker, image):
    listed = docker(
        "run", "--rm", "--user=0", "--entrypoint=find", image, "/", "-xdev", "-type", "f", "-printf", "%P\n"
    )
    names = listed.stdout.splitlines()
    assert len(names) > 10_000
    assert [name for name in names if FORBIDDEN.search(name)] == []
    folders = ["/tmp", "/tmp/flashlab", "/var/cache", "/root", "/opt", "/workspace"]
    left = docker("run", "--rm", "--user=0", "--entrypoint=ls", image, "-A", *folders).stdout.split()
    assert {name for name in left if name.rstrip(":") not in folders} <= {
        "flashlab",
        "venv",
        "examples",
        ".bashrc",
        ".profile",
    }


def test_sbom_lists_what_is_there(docker, image):
    sbom = json.loads(
        docker("run", "--rm", "--entrypoint=cat", image, "/usr/local/share/flashlab/sbom.cdx.json").stdout
    )
    assert sbom["bomFormat"] == "CycloneDX"
    assert sbom["specVersion"] >= "1.5"
    versions = {part["name"].lower().replace("_", "-"): part["version"] for part in sbom["components"]}
    expected = {name.lower(): version for name, version in lock_of(docker, image).items()}
    assert {name: versions.get(name) for name in expected} == expected
    assert ("flash-attn" in versions) == (":cpu-" not in image)
    assert versions.get("flash-attn") in (None, "2.8.3.post2")
    packages = [part["purl"] for part in sbom["components"] if part.get("purl", "").startswith("pkg:deb/")]
    assert any("/tini@" in address for address in packages)
    assert any("/gcc@" in address for address in packages) == (":cpu-" not in image)


def test_both_flash_attn_are_in_the_cuda_image(docker, runtime_image):
    code = """
import json
from importlib.metadata import files, version
import flash_attn.cute, flash_attn.flash_attn_interface as second
assert flash_attn.cute.__file__ in {str(file.locate()) for file in files("flash-attn-4")}, flash_attn.cute.__file__
assert callable(second.flash_attn_func) and callable(flash_attn.cute.flash_attn_func)
built = json.load(open("/usr/local/share/flashlab/build-info.json"))
print(version("flash-attn"), version("flash-attn-4"), built["torch"])
"""
    ran = docker("run", "--rm", runtime_image, "python", "-c", code)
    assert ran.stdout.split() == ["2.8.3.post2", "4.0.0b36", "2.11.0+cu130"]


def test_dev_image_has_tools_and_the_same_packages(docker, dev_image):
    code = (
        "for p in g++ git make less pytest ruff mypy flashlab; do command -v $p >/dev/null || echo $p is missing; done"
    )
    assert docker("run", "--rm", dev_image, "bash", "-c", code).stdout == ""
    docker("run", "--rm", dev_image, "verify-lock", "/usr/local/share/flashlab/requirements.lock")
    where = docker("run", "--rm", dev_image, "python", "-c", "import flashlab; print(flashlab.__file__)").stdout
    assert where.strip() == "/workspace/src/flashlab/__init__.py"


# The entry point


def test_check_passes_with_every_right_taken_away(docker, cpu_image):
    options = ["--user=12345:0", *HARDENED, "--shm-size=1g"]
    ran = docker("run", "--rm", *options, cpu_image, "check", "--quick", "--device", "cpu", timeout=600)
    assert "nothing is wrong" in ran.stdout
    assert re.fullmatch(
        r"flashlab: image cpu-pt210-py312, torch [\w.+]+, no GPU, \d+ cores, user 12345:0\n", ran.stderr
    )


def test_doctor_runs_in_the_cuda_image_without_a_gpu(docker, runtime_image):
    ran = docker("run", "--rm", "--shm-size=1g", runtime_image)  # what the image does when nothing is said
    assert re.search(r"^will use +cpu", ran.stdout, re.MULTILINE)
    assert re.search(r"^flash-attn +2\.8\.3\.post2, 4\.0\.0b36", ran.stdout, re.MULTILINE)
    _, line = ran.stderr.splitlines()
    assert line.startswith(
        "flashlab: no GPU is visible, so all runs on the CPU: start with --gpus all; the host needs "
    )


@pytest.mark.parametrize(
    ("driver", "complaint"),
    [("570.86.10", "driver 570.86.10 is too old for this image's CUDA, which needs 580"), ("580.65.06", "")],
)
def test_old_driver_is_named(docker, runtime_image, tmp_path, driver, complaint):
    (fake := tmp_path / "nvidia-smi").write_text(
        f"#!/bin/sh\necho '{driver}, NVIDIA H200'\necho '{driver}, NVIDIA H200'\n"
    )
    fake.chmod(0o755)
    options = ["--shm-size=1g", f"--volume={fake}:/usr/local/bin/nvidia-smi:ro"]
    first, *rest = docker("run", "--rm", *options, runtime_image, "true").stderr.splitlines()
    assert f"2x NVIDIA H200, driver {driver}, " in first
    assert [line.split(":")[1].strip() for line in rest] == ([complaint] if complaint else [])


def test_small_shared_memory_is_named(docker, cpu_image):
    _, line = docker("run", "--rm", cpu_image, "true").stderr.splitlines()
    assert line == "flashlab: /dev/shm has 64 MiB, which loader workers can exhaust: start with --shm-size 2g"


def test_read_only_without_a_folder_to_write_to_is_refused(docker, cpu_image):
    ran = docker("run", "--rm", "--read-only", cpu_image, "doctor", check=False)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("flashlab: no folder can be written to: start with --tmpfs /tmp")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["bash", "-c", "exit 7"], 7),
        (["false"], 1),  # which is a word of the shell's as well
        (["python", "-c", "raise SystemExit(3)"], 3),
        (["bench", "--impl", "None"], 2),
    ],
    ids=["bash", "false", "python", "flashlab"],
)
def test_exit_code_passes_through(docker, cpu_image, command, code):
    assert docker("run", "--rm", cpu_image, *command, check=False).returncode == code


@pytest.mark.parametrize("word", ["chekc", "if"])
def test_command_that_is_none_gives_one_line(docker, cpu_image, word):
    ran = docker("run", "--rm", "--shm-size=1g", cpu_image, word, check=False)
    assert ran.returncode == 2
    _, line = ran.stderr.splitlines()
    assert line.startswith(f"flashlab: error: no command {word!r}; did you mean `flashlab")


@pytest.mark.parametrize(
    ("answer", "code", "complaint"),
    [
        (
            "Failed to initialize NVML: Driver/library version mismatch",
            18,
            "nvidia-smi says: Failed to initialize NVML",
        ),
        ("No devices were found", 0, "nvidia-smi says: No devices were found"),
    ],
)
def test_what_nvidia_smi_says_is_passed_on(docker, runtime_image, tmp_path, answer, code, complaint):
    (smi := tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    smi.chmod(0o755)
    mount = f"--volume={smi}:/usr/local/bin/nvidia-smi:ro"
    ran = docker("run", "--rm", "--shm-size=1g", mount, runtime_image, "true")
    first, line = ran.stderr.splitlines()
    assert "no GPU" in first
    assert complaint in line


# Runs


def step_of(run: Path) -> int:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def signal_trainer(docker, container: str, name: str) -> None:
    """Send a signal to the trainer and its workers, and to nothing else in the container."""
    code = 'cd /proc; for p in [0-9]*; do tr "\\0" " " <$p/cmdline | grep -q "[f]lashlab train" && echo $p; done; true'
    pids = docker("exec", container, "sh", "-c", code).stdout.split()
    assert pids
    docker("exec", container, "sh", "-c", f"kill -{name} {' '.join(pids)}")


def test_training_is_watched_stopped_killed_and_resumed(docker, start, cpu_image, workspace, mounts):
    run = workspace / "runs/mine"
    last = run / "checkpoints/last.ckpt"
    watched = ["--health-interval=1s", "--health-retries=2", "--health-start-period=0s"]

    def health(container: str) -> str:
        return docker("inspect", "--format={{.State.Health.Status}}", container).stdout.strip()

    def ended(container: str) -> int:
        return int(docker("wait", container, timeout=180).stdout)

    def logs(container: str) -> str:
        ran = docker("logs", container)
        return ran.stdout + ran.stderr

    first = start(cpu_image, *TRAIN, FOREVER, options=[USER, *watched, "--env=FLASHLAB_HEARTBEAT_SECONDS=6", *mounts])
    wait_for("a checkpoint", last.exists)
    wait_for("healthy", lambda: health(first) == "healthy")
    signal_trainer(docker, first, "STOP")
    wait_for("unhealthy", lambda: health(first) == "unhealthy")
    check = docker("exec", first, "healthcheck", check=False)
    assert (check.returncode, check.stdout) == (1, "nothing under runs data was written in the last 6 s\n")
    signal_trainer(docker, first, "CONT")
    wait_for("healthy again", lambda: health(first) == "healthy")

    started = time.monotonic()
    docker("stop", "-t", 60, first)
    assert time.monotonic() - started < 30
    assert ended(first) == 128 + 15
    stopped_at = step_of(run)
    assert f"runs/mine: stopped by SIGTERM at step {stopped_at:,}; continue with --resume\n" in logs(first)

    second = start(cpu_image, *TRAIN, FOREVER, "--resume", options=[USER, *mounts])
    before = written_at(last)
    wait_for("a periodic checkpoint", lambda: written_at(last) > before)
    assert "resumed from runs/mine/checkpoints/last.ckpt" in logs(second)
    docker("kill", "--signal=KILL", second)
    assert ended(second) == 128 + 9
    killed_at = step_of(run)
    assert killed_at > stopped_at
    assert (killed_at - stopped_at) % 20 == 0

    third = start(cpu_image, *TRAIN, str(killed_at + 5), "--resume", options=[USER, *mounts])
    assert ended(third) == 0, logs(third)
    assert "resumed from runs/mine/checkpoints/last.ckpt" in logs(third)
    assert f"runs/mine: trained {killed_at + 5:,} steps" in logs(third)
    assert json.loads((run / "run.json").read_text())["finished"]["steps"] == killed_at + 5
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in run.rglob("*")}
    assert owners == {(os.getuid() or 12345, os.getgid())}


@pytest.mark.parametrize(
    ("volume", "command", "left"),
    [
        ("data/new:size=64k", "data simulate --days 12 --out data/new/bars.csv.gz", ""),
        ("data/new:size=64k", "data prepare data/bars.csv --out data/new/set --context_length 32", ""),
        ("runs:size=256k", " ".join([*TRAIN, "60"]), None),
    ],
    ids=["simulate", "prepare", "train"],
)
def test_full_volume_gives_one_line_and_nothing_half_done(
    docker, cpu_image, workspace, mounts, bars_csv, volume, command, left
):
    shutil.copy(bars_csv, workspace / "data/bars.csv")
    folder = f"/workspace/{volume.split(':')[0]}"
    script = f"flashlab {command}; code=$?; find {folder} -type f >/tmp/left; cat /tmp/left; exit $code"
    options = [USER, "--shm-size=1g", mounts[0], f"--tmpfs=/workspace/{volume},mode=1777"]
    ran = docker("run", "--rm", *options, cpu_image, "bash", "-c", script, check=False)
    assert ran.returncode == 2, ran.stderr
    lines = [line for line in ran.stderr.splitlines()[1:] if "it/s" not in line and "?it" not in line]
    assert len(lines) == 1, ran.stderr
    assert lines[0].startswith("flashlab: error: ")
    assert "No space left" in lines[0]
    found = [line for line in ran.stdout.splitlines() if line.startswith(folder)]
    if left is not None:
        assert found == []
    assert not [name for name in found if re.search(r"\.(tmp|part|partial)\b", name)]


def test_tensorboard_answers_on_loopback_alone(docker, start, cpu_image, mounts):
    command = shlex.split("tensorboard --logdir runs --host 127.0.0.1 --port 6006")
    container = start(cpu_image, *command, options=[USER, "--health-interval=1s", *mounts])
    wait_for(
        "healthy",
        lambda: docker("inspect", "--format={{.State.Health.Status}}", container).stdout.strip() == "healthy",
    )
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:6006/data/environment').read().decode())"
    answer = json.loads(docker("exec", container, "python", "-c", code).stdout)
    assert answer["data_location"].endswith("runs")
    address = docker(
        "inspect", "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container
    ).stdout.strip()
    with pytest.raises(urllib.error.URLError):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{address}:6006/", timeout=5)
    docker("stop", "-t", 30, container)
    assert docker("inspect", "--format={{.State.ExitCode}}", container).stdout.strip() != "137"
    gone = docker("run", "--rm", "--entrypoint=healthcheck", cpu_image, "http", check=False)
    assert (gone.returncode, gone.stdout) == (1, "http://127.0.0.1:6006/ does not answer\n")
