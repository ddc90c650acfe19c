"""Two containers on a network of their own train one run as two machines would, while one after the other is killed.

`a` comes first in torchrun's order, so its process writes the checkpoints; `b` is the host of torchrun's store. Docker
starts again what fails, as Slurm's or Kubernetes' restarts would; what the tests kill, they start again themselves.
"""

import os
import random
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from trainings import differences

pytestmark = pytest.mark.docker

STEPS, CHECKPOINT_EVERY, KILLS = 1000, 20, 10
LOST = "a process that trains with this one has ended or does not answer"
TORCHRUN = shlex.split(
    "torchrun --nnodes 2 --nproc-per-node 1 --max-restarts 100 --rdzv-id btc --rdzv-backend c10d "
    "--rdzv-endpoint b:29400 --rdzv-conf join_timeout=3600 -m -- flashlab train --resume --run runs/mine "
    "--data.path data/tiny --data.context_length 32 --data.stride 16 --data.batch_size 4 "
    "--model.width 16 --model.num_layers 1 --model.num_heads 1 --trainer.accelerator cpu "
    "--trainer.val_every_n_steps 250 --trainer.early_stopping_patience 1000 "
    f"--trainer.max_steps {STEPS} --trainer.checkpoint_every_n_steps {CHECKPOINT_EVERY}"
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Line(NamedTuple):
    time: float
    container: str
    text: str


class Cluster:
    """The containers `a` and `b`, their run folder, and what they say.

    Args:
        docker: of conftest.py.
        image: what they run.
        folder: shared by both: `data/tiny` is the set, `runs/mine` will be the run.
        name: of the network, and beginning of the containers' names.
    """

    def __init__(self, docker: Callable[..., Any], image: str, folder: Path, name: str) -> None:
        self.docker, self.folder, self.name = docker, folder, name
        self.began = time.time()
        docker("network", "create", "--internal", name)
        for host in "ab":
            options = [f"--name={name}-{host}", f"--hostname={host}", f"--network={name}", f"--network-alias={host}"]
            options += [f"--volume={folder / shared}:/workspace/{shared}" for shared in ("data", "runs")]
            options += [f"--env={variable}={value}" for variable, value in ENVIRONMENT.items()]
            options += ["--restart=on-failure", "--shm-size=1g", f"--user={os.getuid() or 12345}:{os.getgid()}"]
            docker("run", "--detach", *options, image, *TORCHRUN)

    def all(self, command: str, *options: str) -> str:
        """Run a command of docker on both."""
        return self.docker(command, *options, f"{self.name}-a", f"{self.name}-b").stdout

    def state(self, host: str, what: str) -> str:
        return self.docker("inspect", f"--format={{{{{what}}}}}", f"{self.name}-{host}").stdout.strip()

    def lines(self, pattern: str = "", since: float = 0) -> list[Line]:
        """Return what both said, in the order of time."""
        said = []
        for host in "ab":
            logs = self.docker("logs", "--timestamps", f"{self.name}-{host}")
            for line in (logs.stdout + logs.stderr).splitlines():
                stamp, _, text = line.partition(" ")
                moment = datetime.fromisoformat(stamp[:26] + "+00:00").timestamp()
                if moment > since and re.search(pattern, text):
                    said.append(Line(moment, host, text))
        return sorted(said)

    def wait(self, what: str, condition: Callable[[], Any], seconds: float = 300) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > deadline:
                said = "\n".join(
                    f"{line.time - self.began:6.1f} s {line.container}: {line.text}" for line in self.lines()
                )
                pytest.fail(f"not in {seconds} s: {what}\n{said}")
            time.sleep(0.2)
        return value

    def first_steps(self, since: float = 0) -> list[tuple[float, int]]:
        """Return when training began or went on, and from which step."""
        lines = self.lines(r"parameters, .* steps on cpu|^step ", since)
        return [
            (line.time, int(line.text.split()[1].replace(",", "")) - 1)
            for before, line in pairwise(lines)
            if line.text.startswith("step ") and "parameters" in before.text
        ]

    def checkpoint(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none."""
        steps = [0]
        for path in self.folder.glob("runs/mine/checkpoints/[lp]*.ckpt"):  # last.ckpt, previous.ckpt
            steps.append(torch.load(path, weights_only=True)["global_step"])
        return max(steps)

    def saved_at(self) -> float:
        """Return when the newest checkpoint was written, 0 if there is none."""
        times = [path.stat().st_mtime for path in self.folder.glob("runs/mine/checkpoints/last.ckpt")]
        return max(times, default=0)

    def kill(self, host: str) -> tuple[float, int]:
        """Pull the plug; returns when, and the step of the newest checkpoint."""
        moment = time.time()
        self.docker("kill", f"{self.name}-{host}")
        return moment, self.checkpoint()

    def revive(self, host: str) -> None:
        self.docker("start", f"{self.name}-{host}")

    def finish(self) -> dict[str, Any]:
        """Wait for the end; returns the checkpoints."""
        self.wait(
            "both have ended", lambda: self.all("inspect", "--format={{.State.Running}}").split() == ["false"] * 2
        )
        codes = self.all("inspect", "--format={{.State.ExitCode}}").split()
        assert codes == ["0", "0"], "\n".join(line.text for line in self.lines())
        paths = [self.folder / f"runs/mine/checkpoints/{name}.ckpt" for name in ("last", "best")]
        return {path.stem: torch.load(path, weights_only=True) for path in paths}


@pytest.fixture(scope="module")
def cluster(docker, cpu_image, prepared, tmp_path_factory):
    @contextmanager
    def make() -> Iterator[Cluster]:
        folder = tmp_path_factory.mktemp("cluster")
        for name in ("data", "runs"):
            (folder / name).mkdir(mode=0o777)
            (folder / name).chmod(0o777)
        shutil.copytree(prepared, folder / "data/tiny")
        name = f"flashlab-{os.getpid()}-{folder.name}"
        try:
            yield Cluster(docker, cpu_image, folder, name)
        finally:
            docker("rm", "--force", "--volumes", f"{name}-a", f"{name}-b", check=False)
            docker("network", "rm", name, check=False)

    return make


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The checkpoints of a run that nothing disturbs; seconds to its first step, and for a step."""
    with cluster() as two:
        checkpoints = two.finish()
        ((first, step),) = two.first_steps()
        assert step == 0
        (end,) = two.lines("trained 1,000 steps")
        # At the end torch's store may warn, with frames of C++, that the other side was the first to go.
        assert [line.text for line in two.lines("Traceback|flashlab: error|Error: ")] == []
        return checkpoints, first - two.began, (end.time - first) / STEPS


def assert_same(checkpoints: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    """Weights, average, optimiser, schedules and loops are bit for bit the same."""
    for name, checkpoint in checkpoints.items():
        for key in undisturbed[name].keys() - {"callbacks", "hyper_parameters"}:
            assert list(differences(checkpoint[key], undisturbed[name][key], f"{name}.{key}")) == []


def test_one_is_killed_and_both_are_stopped(cluster, undisturbed, capsys):
    with cluster() as two:
        two.wait("a checkpoint", two.checkpoint)
        moment, saved = two.kill("a")
        (line,) = two.wait("the survivor notices", lambda: two.lines(LOST, since=moment), seconds=60)
        time.sleep(3)
        assert two.checkpoint() == saved, "the survivor waits"
        assert two.state("b", ".State.Running") == "true"
        assert two.lines("Traceback") == []
        revived = time.time()
        two.revive("a")
        ((resumed, step),) = two.wait("it goes on", lambda: two.first_steps(since=moment))
        assert step == saved
        assert two.state("b", ".RestartCount") == "0"
        with capsys.disabled():
            print(
                f"\nkilled: noticed after {line.time - moment:.1f} s, went on {resumed - revived:.1f} s after the start"
            )

        two.wait("a new checkpoint", lambda: two.checkpoint() > saved)
        asked = time.time()
        two.all("stop", "--time=60")
        (line,) = two.lines("stopped by SIGTERM at step", since=asked)
        stopped = int(re.search(r"at step ([\d,]+)", line.text)[1].replace(",", ""))
        assert two.checkpoint() == stopped
        with capsys.disabled():
            print(f"SIGTERM: a checkpoint after {line.time - asked:.1f} s, all ended after {time.time() - asked:.1f} s")
        two.all("start")
        ((_, step),) = two.wait("it goes on", lambda: two.first_steps(since=asked))
        assert step == stopped
        assert_same(two.finish(), undisturbed[0])


def test_random_kills_lose_nothing_older_than_the_last_checkpoint(cluster, undisturbed, capsys):
    seed = int(os.environ.get("FLASHLAB_TEST_SEED", time.time_ns() % 2**32))
    chance = random.Random(seed)
    checkpoints, seconds_to_start, seconds_per_step = undisturbed
    kills, lost = [], []
    with capsys.disabled():
        print(f"\nFLASHLAB_TEST_SEED={seed}")
    with cluster() as two:
        since = two.began
        for number in range(KILLS):
            host = chance.choice("ab")
            if chance.random() < 0.5 and two.checkpoint() < STEPS / 2:
                two.wait("it goes on", lambda since=since: two.first_steps(since))
                time.sleep(chance.uniform(0, 0.6))
            else:
                until = time.time() + chance.uniform(0, seconds_to_start)
                while time.time() < until and not two.first_steps(since):
                    time.sleep(min(0.5, max(0, until - time.time())))
            moment, saved = two.kill(host)
            assert saved < STEPS - 1, "training ended too early for all the kills: give it more steps"
            going_on = [when for when, _ in two.first_steps(since)]
            if going_on:  # how far it came is in no file: at an undisturbed run's speed since the last checkpoint
                lost.append(min((moment - max(*going_on, two.saved_at())) / seconds_per_step, CHECKPOINT_EVERY))
            kills.append((moment, saved))
            with capsys.disabled():
                doing = f"training, about {lost[-1]:.0f} steps lost" if going_on else "starting"
                print(f"kill {number + 1:2}, of {host}, last checkpoint of step {saved}: {doing}")
            since = moment
            time.sleep(chance.uniform(0, 1))
            two.revive(host)
        assert_same(two.finish(), checkpoints)
        resumes = [(when, step) for when, step in two.first_steps() if when > kills[0][0]]
        for when, step in resumes:
            newest = max(saved for moment, saved in kills if moment < when)
            assert newest <= step <= newest + CHECKPOINT_EVERY, f"went on from {step}, a checkpoint was of {newest}"
        with capsys.disabled():
            print(
                f"{len(kills)} kills, {len(resumes)} resumes that came to a step, about {sum(lost):.0f} steps done "
                f"again, {time.time() - two.began:.0f} s"
            )
