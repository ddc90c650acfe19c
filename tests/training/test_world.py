import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.distributed import TCPStore
from torch.distributed.run import get_args_parser

from flashlab import cli
from flashlab.errors import UserError
from flashlab.training.world import SameStart, choose_size, lost_peers

ROOT = Path(__file__).parents[2]
TINY = (
    "--data.context_length 32 --data.stride 16 --data.batch_size 4 --model.width 16 --model.num_layers 1 "
    "--trainer.max_steps 100000 --trainer.val_every_n_steps 100000 --trainer.checkpoint_every_n_steps 20 "
    "--trainer.accelerator cpu --data.num_workers 1 --resume"
)


@pytest.fixture
def torchrun(monkeypatch):
    """Pretend that torchrun runs this process, with `--nproc-per-node` 4 on two machines unless told otherwise."""

    def pretend(**variables):
        given = {"WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4, "GROUP_WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": False}
        for name, value in {"TORCHELASTIC_RUN_ID": "x", **given, **variables}.items():
            monkeypatch.setenv(name, str(value))

    return pretend


@pytest.mark.parametrize(("devices", "num_nodes"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_torchrun_says_how_many_processes_there_are(torchrun, devices, num_nodes):
    assert choose_size(devices, num_nodes) == (devices, num_nodes)
    torchrun()
    assert choose_size(devices, num_nodes) == (4, 2)


@pytest.mark.parametrize(
    ("asked", "variables", "complaint"),
    [
        ((2, 1), {}, "--trainer.devices 2: torchrun gives 4; leave the option out under torchrun"),
        ((4, 4), {}, "--trainer.num_nodes 4: torchrun gives 2; leave the option out under torchrun"),
        ((1, 1), {"WORLD_SIZE": 6}, "torchrun runs 4 of 6 processes here, on one of 2 machines; give all machines the"),
        ((1, 1), {"TORCHELASTIC_USE_AGENT_STORE": True}, "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is"),
    ],
)
def test_what_torchrun_contradicts_is_refused_in_one_line(torchrun, asked, variables, complaint):
    torchrun(**variables)
    with pytest.raises(UserError, match=re.escape(complaint)) as raised:
        choose_size(*asked)
    assert "\n" not in str(raised.value)


def test_a_store_that_is_gone_is_told_in_one_line():
    with pytest.raises(UserError) as raised, lost_peers(Path("runs/x")):
        TCPStore("127.0.0.1", 9, is_master=False, timeout=timedelta(seconds=1))
    assert re.fullmatch(
        r"runs/x: a process that trains with this one has ended .*\(.+\); .*--resume.*", str(raised.value)
    )


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), lost_peers(Path("runs/x")):
        raise RuntimeError("shapes do not fit")


def test_processes_that_loaded_different_checkpoints_do_not_train():
    trainer = SimpleNamespace(global_step=220, strategy=SimpleNamespace(broadcast=lambda step: step))
    SameStart(Path("runs/x")).on_train_start(trainer, None)
    trainer.strategy.broadcast = lambda step: 240
    with pytest.raises(
        UserError, match=r"runs/x: the last checkpoint is of step 220 here and of step 240 where the first"
    ):
        SameStart(Path("runs/x")).on_train_start(trainer, None)


def wait_for(condition, what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(0.1)
    return value


@pytest.mark.slow
def test_torchrun_starts_anew_after_a_kill_and_stops_with_a_checkpoint(prepared, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "--", "flashlab", "train", *TINY.split()]
    command = [sys.executable, "-m", "torch.distributed.run", *command, "--data.path", prepared, "--run", run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    said = lambda pattern: re.findall(pattern, log.read_text(), re.MULTILINE)  # noqa: E731

    def step():
        try:
            return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        except FileNotFoundError:  # for the moment in which it becomes previous.ckpt
            return 0

    with log.open("w") as file:
        agent = subprocess.Popen(list(map(str, command)), env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for((run / "checkpoints/last.ckpt").exists, "a checkpoint")
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        wait_for(lambda: len(said(r"^step \d+ of")) == 2, "it goes on")
        before, resumed = map(int, said(r"^step (\d+) of"))
        assert before == 1
        assert resumed % 20 == 1
        assert said(
            r"^flashlab: error: .*/run: a process that trains with this one has ended or does not answer \(.+\); "
        )
        assert said("Traceback") == []
        wait_for(lambda: step() > resumed, "another checkpoint")
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) != 0
        (stopped,) = said(r"stopped by SIGTERM at step (\d+)")
        assert step() == int(stopped)
    finally:
        agent.terminate()  # and with it its processes, should the test have failed
        agent.wait(60)


def check(words):
    """Parse what starts with torchrun, with torchrun's parser and flashlab's; returns what torchrun understood."""
    assert words[0] == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert (options.module, options.training_script, options.training_script_args[0]) == (True, "flashlab", "train")
    command = cli.load("train")
    argv = cli._complete_flags(command, options.training_script_args[1:])
    assert cli.build_parser("train", command).parse_args(argv).resume
    return options


def test_the_commands_of_the_page_are_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line[line.index("torchrun ") :]) for line in lines if "torchrun " in line]
    assert [check(words).nnodes for words in commands] == ["2", "2"]


def test_the_kubernetes_manifest_runs_a_command_that_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    service, claim, secret, job = yaml.safe_load_all((ROOT / "examples/cluster/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = check(container["args"])
    assert int(options.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = job["metadata"]["name"]
    assert options.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29400"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"]}}]
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]


@pytest.mark.parametrize(("restarts", "code", "queued_again"), [(0, 0, False), (0, 1, True), (20, 1, False)])
def test_the_slurm_script_runs_a_command_that_is_understood(restarts, code, queued_again, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, body in {
        "srun": f'printf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@" >{tmp_path}/srun.txt; exit {code}',
        "scontrol": f'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" >{tmp_path}/scontrol.txt; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "n[1-2]", "NNODES": 2, "GPUS_ON_NODE": 8, "JOB_ID": 123456, "RESTART_COUNT": restarts}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = ["examples/cluster/slurm.sh", "--data.path", "data/my bars", "--run", "runs/bars"]
    ran = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (code, "")
    share, kill, *words = (tmp_path / "srun.txt").read_text().splitlines()
    assert (share, kill) == ("1", "--kill-on-bad-exit=1")
    options = check(words)
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "8", "first:23456")
    assert options.rdzv_id == f"123456-{restarts}"
    assert "data/my bars" in options.training_script_args
    assert (tmp_path / "scontrol.txt").exists() == queued_again
