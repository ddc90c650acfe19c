"""The devcontainer, opened with the devcontainer CLI, and `docker/attach` with a program that stands for VS Code.

All is as for a user, with the checked-in devcontainer.json, except that its initializeCommand, `make dev-image`, finds
a `make` that tags the image built here instead of building one. Where the tests run as root, the CLI runs as another
user: otherwise there would be no UID to map.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
UID, GID = (os.getuid(), os.getgid()) if os.getuid() else (4321, 4321)
DOCKER_SOCKET = Path("/var/run/docker.sock")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cpu_dev_image(bake: Run, cpu_image: str) -> str:
    bake("dev-cpu-py312")
    return f"{cpu_image}-dev"


def write_program(path: Path, *lines: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout() -> Iterator[Path]:
    """A copy of the project that belongs to the user who opens it, and is not in pytest's folder, which is root's."""
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    with tempfile.TemporaryDirectory(prefix="flashlab-devcontainer-") as name:
        folder = Path(name)
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (copy := folder / "flashlab" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy)
        (folder / "home").mkdir()
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, UID, GID)
        yield folder / "flashlab"


@pytest.fixture(scope="module")
def devcontainer(checkout: Path, cpu_dev_image: str, docker: Run) -> Iterator[Run]:
    """Run the CLI in the checkout: ``devcontainer("exec", "id")``."""
    if not (cli := shutil.which("devcontainer")):
        pytest.skip("no devcontainer command is here: npm install --global @devcontainers/cli")
    programs = checkout.parent / "bin"
    write_program(
        programs / "make",
        '[ "$*" = dev-image ] || { echo "make $*: expected dev-image"; exit 2; }',
        f"exec docker tag {cpu_dev_image} flashlab:dev",
    )
    # The CLI asks for the name of its user, and the one that root takes here has none.
    write_program(programs / "id", '[ "$*" = "-u -n" ] && echo someone || exec /usr/bin/id "$@"')
    environment = {**os.environ, "HOME": str(checkout.parent / "home"), "PATH": f"{programs}:{os.environ['PATH']}"}
    identity = {}
    if os.getuid() == 0:
        groups = [DOCKER_SOCKET.stat().st_gid] if DOCKER_SOCKET.exists() else []
        identity = {"user": UID, "group": GID, "extra_groups": groups}

    def run(verb: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [cli, verb, "--workspace-folder", str(checkout), *arguments]
        ran = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600, **identity
        )
        if check and ran.returncode:
            pytest.fail(f"devcontainer {verb}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    before = docker("image", "inspect", "--format", "{{.Id}}", "flashlab:dev", check=False).stdout.strip()
    yield run
    for container in docker("ps", "-aq", "--filter", f"label=devcontainer.local_folder={checkout}").stdout.split():
        inspected = json.loads(docker("inspect", container).stdout)[0]
        docker("rm", "--force", container)
        docker("volume", "rm", *(mount["Name"] for mount in inspected["Mounts"] if mount["Type"] == "volume"))
        docker("rmi", inspected["Config"]["Image"])
    if before:
        docker("tag", before, "flashlab:dev")
    else:
        docker("rmi", "flashlab:dev", check=False)


@pytest.fixture(scope="module")
def opened(devcontainer: Run) -> subprocess.CompletedProcess[str]:
    return devcontainer("up")


@pytest.fixture
def inside(devcontainer: Run, opened: subprocess.CompletedProcess[str]) -> Callable[..., str]:
    """Run a command in the opened devcontainer and give what it prints."""
    return lambda *command: devcontainer("exec", *command).stdout.strip()


@pytest.fixture
def container(docker: Run, opened: subprocess.CompletedProcess[str]) -> dict:
    answer = json.loads(opened.stdout.splitlines()[-1])
    assert (answer["outcome"], answer["remoteUser"]) == ("success", "flashlab")
    assert answer["remoteWorkspaceFolder"] == "/workspace"
    return json.loads(docker("inspect", answer["containerId"]).stdout)[0]


def test_opens_and_says_what_is_here(opened, container, docker):
    assert f"cores, user {UID}:{GID}" in opened.stdout + opened.stderr  # the entry point's line
    if "nvidia" not in docker("info", "--format", "{{json .Runtimes}}").stdout:
        assert not container["HostConfig"]["DeviceRequests"]
    assert container["HostConfig"]["Init"]
    assert container["HostConfig"]["ShmSize"] == 2 << 30
    assert container["HostConfig"]["SecurityOpt"] == ["no-new-privileges"]
    assert not container["HostConfig"]["PortBindings"]


def test_the_mounted_package_is_the_one_that_runs(inside, checkout):
    (checkout / "src/flashlab/new_here.py").write_text("print('from the host')")
    assert inside("python", "-c", "import flashlab.new_here, sys; print(sys.prefix)") == "from the host\n/opt/venv"
    assert inside("sh", "-c", "command -v flashlab") == "/opt/venv/bin/flashlab"


def test_files_belong_to_the_host_user(inside, checkout):
    assert inside("id", "-u", "-n") == "flashlab"
    inside("sh", "-c", "touch here runs/here /tmp/flashlab/here ~/here")
    for path in (checkout / "here", checkout / "runs/here"):
        assert (path.stat().st_uid, path.stat().st_gid) == (UID, GID)
    # Every process, those of the container itself too.
    assert inside("sh", "-c", "stat -c %u /proc/[0-9]*/ 2>/dev/null | sort -u") == str(UID)


def test_tests_run_at_once(inside):
    printed = inside(
        *["env", "OMP_NUM_THREADS=1", "pytest", "-q", "-r", "fE", "-n", "logical", "--maxprocesses", "4"],
        *["-m", "not docker and not gpu and not slow", "tests/attention"],
    )
    assert " passed" in printed.splitlines()[-1]


def test_make_takes_the_environment_of_the_image(inside):
    assert inside("make", "--dry-run", "lint").splitlines()[0] == "/opt/venv/bin/ruff check"


def test_settings_name_what_is_there(inside, devcontainer):
    read = json.loads(devcontainer("read-configuration").stdout.splitlines()[-1])["configuration"]
    assert read["forwardPorts"] == [6006]
    assert list(read["portsAttributes"]) == ["6006"]
    settings = read["customizations"]["vscode"]["settings"]
    inside(settings["python.defaultInterpreterPath"], "-m", "ruff", "--version")
    inside(settings["python.defaultInterpreterPath"], "-m", "mypy", "--version")
    assert "tests/test_doctor.py" in inside("pytest", "--collect-only", "-qq", *settings["python.testing.pytestArgs"])


@pytest.fixture
def project(cpu_dev_image: str, docker: Run) -> Iterator[dict[str, str]]:
    """The environment in which compose.yaml is a project of its own, with the image built here."""
    name = f"flashlab-test-attach-{os.getpid()}"
    docker("tag", cpu_dev_image, f"flashlab:{name}-dev")
    files = {"COMPOSE_FILE": "compose.yaml:docker/compose.cpu.yaml", "FLASHLAB_TAG": name}
    environment = {**os.environ, **files, "COMPOSE_PROJECT_NAME": name}
    yield environment
    docker("compose", "--profile", "more", "down", "--volumes", "--timeout", "1", cwd=ROOT, env=environment)
    docker("rmi", f"flashlab:{name}-dev")


def test_attach_opens_the_running_dev_service(project, docker, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("docker", "dirname", "od", "sh", "tr"):
        (programs / program).symlink_to(str(shutil.which(program)))

    def attach() -> subprocess.CompletedProcess[str]:
        environment = {**project, "PATH": str(programs)}
        return subprocess.run([ROOT / "docker/attach"], env=environment, capture_output=True, text=True, timeout=60)

    ran = attach()
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "attach: the service dev is not running: start it with 'make up SERVICE=dev'\n"

    docker("compose", "up", "--detach", "dev", cwd=ROOT, env=project)
    ran = attach()
    assert ran.returncode == 1
    assert ran.stdout.startswith("code --folder-uri vscode-remote://attached-container+")
    assert ran.stderr.startswith("attach: there is no 'code' here: install VS Code with the extension Dev Containers")
    assert ran.stderr.count("\n") == 1

    write_program(programs / "code", 'echo "opened: $2"')
    ran = attach()
    assert (ran.returncode, ran.stderr) == (0, "")
    command, opened = ran.stdout.splitlines()
    address = opened.removeprefix("opened: vscode-remote://attached-container+")
    assert command.endswith(address)
    container = json.loads(bytes.fromhex(address.removesuffix("/workspace")))["containerName"]
    assert container == f"/{project['COMPOSE_PROJECT_NAME']}-dev-1"
    mounts = json.loads(docker("inspect", "--format", "{{json .Mounts}}", container).stdout)
    assert str(ROOT) in [mount["Source"] for mount in mounts if mount["Destination"] == "/workspace"]
