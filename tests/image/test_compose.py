"""The services of compose.yaml: on a GPU host as they stand, and run for real on the CPU."""

import json
import os
import re
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
GPU, CPU = ("compose.yaml",), ("compose.yaml", "docker/compose.cpu.yaml")
NEED_GPU = {"train", "evaluate", "check", "bench", "gpt2", "dev", "test"}
USER = 12345
STEPS = 120


def compose(*arguments, files, project=ROOT, check=True, **environment):
    """Run docker compose with no variable that happens to be set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLASHLAB_", "COMPOSE_"))}
    command = ["docker", "compose", "--project-directory", str(project)]
    command += [f"--file={project / file}" for file in files] + [str(argument) for argument in arguments]
    options = {"capture_output": True, "text": True, "timeout": 600, "env": {**kept, **environment}}
    ran = subprocess.run(command, check=False, **options)
    assert not check or ran.returncode == 0, f"{command}: exit code {ran.returncode}\n{ran.stdout}{ran.stderr}"
    return ran


def settings():
    """The variables that .env.example offers, all of them set."""
    return dict(re.findall(r"^#(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))


def variants():
    return re.findall(r'name = "([^"]+)", tag = "([^"]+)"', (ROOT / "docker/docker-bake.hcl").read_text())


@pytest.mark.parametrize("environment", [{}, settings()], ids=["plain", "all variables"])
@pytest.mark.parametrize("files", [GPU, CPU], ids=["gpu", "cpu"])
def test_every_combination_is_clean(files, environment):
    environment = {name: value for name, value in environment.items() if name != "COMPOSE_FILE"}
    ran = compose("--profile", "more", "config", "--format", "json", files=files, **environment)
    assert ran.stderr == ""
    services = json.loads(ran.stdout)["services"]
    known = dict(variants())
    assert len(services) == 8
    for name, service in services.items():
        args, stage = service["build"]["args"], service["build"]["target"]
        suffix = "-dev" if stage == "dev" else ""
        assert service["image"] == f"flashlab:{known[args['VARIANT']]}{suffix}" == f"flashlab:{args['TAG']}"
        assert "reservations" in service["deploy"]["resources"] if files == GPU and name in NEED_GPU else True
        assert "nvidia" not in json.dumps(service) or (files == GPU and name in NEED_GPU)
        assert service["init"]
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert not service["user"].startswith("0:")
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))


@pytest.fixture(scope="module")
def project(cpu_image, tmp_path_factory):
    """A checkout's compose files and empty folders, of a user whom the image does not know."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in CPU:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text((ROOT / file).read_text())
    for name in ("data", "runs"):
        (folder / name).mkdir()
        os.chown(folder / name, USER, USER)
    names = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    images = {"name": "flashlab-test", "services": {name: {"image": cpu_image} for name in names}}
    (folder / "test.yaml").write_text(yaml.safe_dump(images))
    yield folder
    compose("--profile", "more", "down", "--volumes", "--timeout", "1", files=(*CPU, "test.yaml"), project=folder)


@pytest.fixture(scope="module")
def run(project):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def run(*arguments, files=CPU, **options):
        environment = {"FLASHLAB_UID": str(USER), "FLASHLAB_GID": str(USER), "TENSORBOARD_PORT": port}
        environment["FLASHLAB_TRAIN_ARGS"] = f"--trainer.max_steps {STEPS} --trainer.checkpoint_every_n_steps 20"
        environment["FLASHLAB_GPT2_ARGS"] = "--trainer.max_steps 20 --optimizer.warmup_steps 5"
        return compose(*arguments, files=(*files, "test.yaml"), project=project, **environment, **options)

    run.port = int(port)
    return run


def wait_for(condition, seconds, what):
    """Return after how many seconds it held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return time.monotonic() - start


def said_since(run, mark):
    return run("logs", "--no-log-prefix", "train").stdout.rpartition(mark)[2]


def test_train_from_nothing_to_the_report_through_a_stop_and_a_kill(run, project, docker, capsys):
    start = time.monotonic()
    run("up", "--detach", "train")
    wait_for(lambda: "\nstep 1 of" in said_since(run, "flashlab: image"), 120, "the first step")
    with capsys.disabled():
        print(f"\nfrom `docker compose up train` to the first step: {time.monotonic() - start:.1f} s")

    run("up", "--detach", "tensorboard")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers(host):
        try:
            return opener.open(f"http://{host}:{run.port}/", timeout=5).status == 200
        except OSError:
            return False

    wait_for(lambda: answers("127.0.0.1"), 60, "TensorBoard answers")
    container = run("ps", "--quiet", "tensorboard").stdout.strip()
    assert docker("port", container).stdout.split() == ["6006/tcp", "->", f"127.0.0.1:{run.port}"]
    run("exec", "tensorboard", "healthcheck")

    checkpoint = project / "runs/simulated/checkpoints/last.ckpt"
    wait_for(checkpoint.exists, 120, "a checkpoint")
    seconds = time.monotonic()
    run("stop", "train")
    seconds = time.monotonic() - seconds
    assert seconds < 60, "the grace period"
    assert re.search(r"stopped by SIGTERM at step \d+; continue with --resume", run("logs", "train").stdout)
    with capsys.disabled():
        print(f"stopped in {seconds:.1f} s")

    run("up", "--detach", "train")
    wait_for(lambda: "resumed from" in said_since(run, "flashlab: image"), 120, "it goes on")
    before = checkpoint.stat().st_mtime_ns
    wait_for(lambda: checkpoint.stat().st_mtime_ns > before, 120, "another checkpoint")
    run("kill", "--signal", "SIGKILL", "train")

    done = run("up", "--exit-code-from", "train", "train")
    assert re.search(r"resumed from .*(last|previous)\.ckpt", done.stdout)
    assert f"trained {STEPS} steps" in done.stdout
    report = project / "runs/simulated/report.html"
    assert report.stat().st_size > 10_000
    files = [*project.glob("data/**/*"), *project.glob("runs/**/*")]
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in files}
    assert owners == {(USER, USER)}

    again = run("up", "--exit-code-from", "train", "train")
    assert "is trained already" in again.stdout


def test_other_services(run):
    assert run("run", "--rm", "evaluate", "doctor").returncode == 0
    right = run("run", "--rm", "check", "check", "--quick", "--backend", "sdpa_math")
    assert "nothing is wrong" in right.stdout


def test_gpt2_from_nothing_to_a_sample(run, project):
    done = run("up", "--exit-code-from", "gpt2", "gpt2")
    assert "trained 20 steps" in done.stdout
    assert re.search(r"gpt2-1 +\| import ", done.stdout)
    assert (project / "data/gpt2/manifest.json").exists()
    again = run("up", "--exit-code-from", "gpt2", "gpt2")
    assert "is trained already" in again.stdout
    assert re.search(r"gpt2-1 +\| import ", again.stdout)


def test_folders_of_somebody_else_are_explained(run, project):
    ran = run("run", "--rm", "--user", "4321:4321", "check", "backends")
    expected = f"/workspace/data belongs to {USER}:{USER} and cannot be written to by 4321:4321: start as its owner"
    assert expected in ran.stderr


def test_a_host_without_a_gpu_is_told_so_by_docker(run, docker):
    if "nvidia" in docker("info", "--format", "{{json .Runtimes}}").stdout:
        pytest.skip("this host has NVIDIA's Container Toolkit")
    ran = run("run", "--rm", "check", files=GPU, check=False)
    message = 'could not select device driver "nvidia" with capabilities: [[gpu]]'
    assert message in ran.stderr
    assert message in (ROOT / "docs/troubleshooting.md").read_text()
