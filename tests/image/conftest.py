"""What the tests of the images share. They need a Docker Engine, and are skipped where there is none.

Fixtures:
    docker: ``docker("run", "--rm", image, "doctor")`` runs the client and gives the completed process, with its output
        as text; a failure is an error unless ``check=False``.
    start: ``start(image, "train", options=["--health-interval=1s"])`` starts a container in the background and gives
        its ID; it is removed when the test ends.
    bake: ``bake("runtime-cpu-py312", root=folder, COMMIT="abc")`` builds targets of docker/docker-bake.hcl, with its
        variables, on the base images named below.
    baking: command and environment of that bake, for `subprocess.Popen`.
    runtime_image, dev_image: tags of the cu130-py312 variant's images, built once, with the wheel that is given.
    cpu_image: tag of the CPU variant's runtime image, built once.
    workspace: a new folder with `data` and `runs` that any user may write to; `data/tiny` is a prepared set for
        contexts of 32 bars.

Environment, all of it optional; `.ci/stand-ins` prepares what it names where no base image can be pulled:
    FLASHLAB_TEST_UBUNTU_IMAGE, FLASHLAB_TEST_CUDA_13_IMAGE: base images in place of the Dockerfile's.
    FLASHLAB_TEST_WHEELS: folder of compiled flash-attn wheels; without it the CUDA images are not built.
    FLASHLAB_TEST_CPU_ARGS: more options of `docker buildx bake` for the CPU image.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = "flashlab-test"
CUDA_TAG, CPU_TAG = "cu130-pt211-py312", "cpu-pt210-py312"

Docker = Callable[..., subprocess.CompletedProcess[str]]


def _docker(*arguments: Any, check: bool = True, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess:
    command = ["docker", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)
    if check and ran.returncode:
        pytest.fail(f"{shlex.join(command)}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return ran


@pytest.fixture(scope="session", autouse=True)
def engine() -> Iterator[None]:
    """Skip everything here where no Docker Engine answers; in the end remove the images that newer ones replaced."""
    if not shutil.which("docker"):
        pytest.skip("no docker command is here")
    if (ran := _docker("info", check=False)).returncode:
        pytest.skip(f"no Docker Engine answers: {ran.stderr.strip().splitlines()[-1]}")
    yield
    _docker("image", "prune", "--force", "--filter", "label=org.opencontainers.image.title=FlashLab")


@pytest.fixture(scope="session")
def docker(engine: None) -> Docker:
    return _docker


def _baking(*arguments: str, **variables: str) -> dict[str, Any]:
    """Give command and environment of a bake: the base images named here, and no variable that happens to be set."""
    command = ["docker", "buildx", "bake", "--file", "docker/docker-bake.hcl", "--progress", "plain"]
    wheels = os.environ.get("FLASHLAB_TEST_WHEELS", "")
    for argument, variable in {"UBUNTU_IMAGE": "UBUNTU_IMAGE", "CUDA_13_0_IMAGE": "CUDA_13_IMAGE"}.items():
        if given := os.environ.get(f"FLASHLAB_TEST_{variable}"):
            command += ["--set", f"*.args.{argument}={given}"]
    if wheels:
        command += [f"--allow=fs.read={wheels}"]
    if any("-cpu-" in argument for argument in arguments):
        command += shlex.split(os.environ.get("FLASHLAB_TEST_CPU_ARGS", ""))
    taken = {"COMMIT", "UID", "GID", "MAX_JOBS", "NVCC_THREADS", "FLASH_ATTN_CUDA_ARCHS"}
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    return {"args": [*command, *arguments], "env": {**environment, "IMAGE": IMAGE, "WHEELS": wheels, **variables}}


@pytest.fixture(scope="session")
def baking(engine: None) -> Callable[..., dict[str, Any]]:
    return _baking


@pytest.fixture(scope="session")
def bake(engine: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(
        *arguments: str, root: Path = ROOT, check: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = _baking(*arguments, **variables)
        ran = subprocess.run(**command, cwd=root, capture_output=True, text=True, timeout=3600)
        if check and ran.returncode:
            pytest.fail(f"{shlex.join(command['args'])}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    return run


def _need_wheel() -> None:
    if not os.environ.get("FLASHLAB_TEST_WHEELS"):
        pytest.skip("flash-attn would be compiled for an hour: FLASHLAB_TEST_WHEELS names no folder of wheels")


@pytest.fixture(scope="session")
def runtime_image(bake: Callable) -> str:
    _need_wheel()
    bake("runtime-cu130-py312")
    return f"{IMAGE}:{CUDA_TAG}"


@pytest.fixture(scope="session")
def dev_image(bake: Callable) -> str:
    _need_wheel()
    bake("dev-cu130-py312")
    return f"{IMAGE}:{CUDA_TAG}-dev"


@pytest.fixture(scope="session")
def cpu_image(bake: Callable) -> str:
    bake("runtime-cpu-py312")
    return f"{IMAGE}:{CPU_TAG}"


@pytest.fixture
def start(docker: Docker) -> Iterator[Callable[..., str]]:
    started: list[str] = []

    def start(image: str, *command: str, options: list[str] | tuple[str, ...] = ()) -> str:
        started.append(docker("run", "--detach", *options, image, *command).stdout.strip())
        return started[-1]

    yield start
    if started:
        docker("rm", "--force", "--volumes", *started)


@pytest.fixture
def workspace(prepared: Path, tmp_path: Path) -> Path:
    for name in ("data", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    shutil.copytree(prepared, tmp_path / "data/tiny")
    return tmp_path
