import math
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import SpawnProcess

import pytest

from flashlab.errors import Terminated, terminable
from flashlab.worker import Worker, WorkerLost, run_flashlab


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path / "log")
    yield worker
    worker.stop()


def test_it_answers_and_passes_on_what_a_function_raises(worker):
    assert worker.call(math.hypot, 3, 4, timeout_s=30) == 5
    with pytest.raises(ValueError, match="invalid literal"):
        worker.call(int, "x", timeout_s=30)
    assert worker.call(os.getenv, "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", timeout_s=30) == "1"


def test_a_stop_that_comes_while_it_starts_waits_and_leaves_no_process(tmp_path, monkeypatch, capfd):
    """Another thread takes the signal, as libraries have some, and Python acts on it in this one."""
    original, started = SpawnProcess.start, []

    def start(process):
        os.kill(os.getpid(), signal.SIGTERM)
        original(process)
        started.append(process)

    monkeypatch.setattr(SpawnProcess, "start", start)
    ended = threading.Event()
    threading.Thread(target=ended.wait).start()
    try:
        with terminable(), pytest.raises(Terminated):
            Worker(tmp_path / "log")
    finally:
        ended.set()
    assert [process.exitcode for process in started] == [-signal.SIGKILL]
    assert capfd.readouterr() == ("", "")


class Unsendable(Exception):  # noqa: N818
    """It cannot be made again from its message alone, as some libraries' errors cannot."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def fail() -> None:
    raise Unsendable("a fault", "a library")


def test_an_error_that_cannot_be_sent_arrives_in_words(worker):
    with pytest.raises(RuntimeError, match=r"^Unsendable: a fault in a library$"):
        worker.call(fail, timeout_s=30)
    assert worker.call(math.sqrt, 4, timeout_s=30) == 2


def test_what_is_printed_there_goes_to_the_log(worker, tmp_path, capfd):
    worker.call(os.system, "echo from a kernel; echo and its errors >&2", timeout_s=30)
    worker.call(print, "from Python", flush=True, timeout_s=30)
    assert (tmp_path / "log").read_text() == "from a kernel\nand its errors\nfrom Python\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "argument", "says"),
    [
        (os.abort, None, "ended by SIGABRT"),
        (signal.raise_signal, signal.SIGSEGV, "ended by SIGSEGV"),
        (os._exit, 3, "ended with exit code 3"),
        (time.sleep, 60, "took longer than 1 s"),
    ],
)
def test_a_process_that_is_lost_says_how(worker, function, argument, says):
    worker.call(math.sqrt, 4, timeout_s=30)  # it has started
    with pytest.raises(WorkerLost, match=says):
        worker.call(function, *() if argument is None else (argument,), timeout_s=1)
    with pytest.raises(WorkerLost):
        worker.call(math.sqrt, 4, timeout_s=1)


def test_a_command_is_asked_to_stop_before_it_is_ended(tmp_path, monkeypatch):
    command = tmp_path / "python"
    command.write_text("#!/bin/sh\ntrap 'echo \"$@\" > asked; exit 3' TERM\nsleep 60 & wait\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    with pytest.raises(subprocess.TimeoutExpired):
        run_flashlab("gpt2", "train", timeout_s=1, cwd=tmp_path)
    assert (tmp_path / "asked").read_text() == "-m flashlab gpt2 train\n"


def test_ctrl_c_is_the_parents_affair(worker):
    pid = worker.call(os.getpid, timeout_s=30)
    os.kill(pid, signal.SIGINT)
    assert worker.call(os.getpid, timeout_s=30) == pid
