"""Processes for what may crash, hang or spoil the GPU, so that it takes nothing else with it: functions, commands."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Set before anything is imported there: kernels that are compiled stay on the disk, and compiling stays in the process.
ENVIRONMENT = {"FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

GRACE_S = 30.0  # for a command that is asked to stop
STOPS = (signal.SIGINT, signal.SIGTERM)


class WorkerLost(Exception):  # noqa: N818 - it is the worker that is lost, whatever the error was
    """The process died or took too long; `signal_number` says what ended it, where something did."""

    def __init__(self, message: str, signal_number: int | None = None) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class Worker:
    """A process that waits for calls and answers them one by one.

    Args:
        log: File to which everything goes that it or a library prints.
        has_children: It starts processes itself, which outlive it when it is killed.
    """

    def __init__(self, log: Path, *, has_children: bool = False) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, log), daemon=not has_children)
        resource_tracker.ensure_running()  # starting it lets signals through again, up to Python 3.13
        try:
            with _stops_held_back():  # else a stop in between leaves it with a traceback
                self._process.start()
        except BaseException:
            if self._process.is_alive():
                self.stop()
            raise
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float, **options: Any) -> Any:
        """Run a module's function there and return what it returns; raises what `receive` raises."""
        self.send(function, *arguments, **options)
        return self.receive(timeout_s)

    def send(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Start a call; `receive` gives its answer, and `connection` can be waited on."""
        with suppress(ConnectionError):  # it is dead, which `receive` says
            self.connection.send((function, arguments, options))

    def receive(self, timeout_s: float | None = None) -> Any:
        """Wait for the answer to the last call.

        Raises:
            WorkerLost: the process died, or has not answered in time and was ended.
            Exception: whatever the function raised.
        """
        try:
            if not self.connection.poll(timeout_s):
                self.stop()
                raise WorkerLost(f"took longer than {timeout_s:g} s")
            answer, error = self.connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise WorkerLost(f"its process was {ended}", -code if code < 0 else None) from None
        if error is not None:
            raise error
        return answer

    def stop(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()


# Started by torchrun, a process passes for one of a machine of its own, with one GPU: that of all of them. What the
# machine is called is asked by NCCL, which otherwise refuses to connect two processes on one GPU.
AS_MACHINE = (
    'exec env GROUP_RANK="$RANK" GROUP_WORLD_SIZE="$WORLD_SIZE" LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 '
    'NCCL_HOSTID="$RANK" "$0" "$@"'
)


def run_flashlab(
    *words: object, timeout_s: float | None = None, sharing: int = 1, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command of this package in a process of its own, as `subprocess.run` would.

    Args:
        words: of the command line.
        timeout_s: longest time.
        sharing: see `running_flashlab`.
        options: of `subprocess.Popen`.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with running_flashlab(*words, sharing=sharing, **options) as process:
        out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def running_flashlab(*words: object, sharing: int = 1, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a command of this package, and wait for its end.

    What ends this process asks that one to stop, and waits for it: a training writes its checkpoint first, and ends the
    processes that it has started.

    Args:
        words: of the command line.
        sharing: processes that do it together on one GPU. Each has in memory what it would have on a GPU of its own;
            what they exchange goes through a network, and they take turns, so that times mean nothing.
        options: of `subprocess.Popen`.
    """
    command = [sys.executable, "-m", "flashlab", *map(str, words)]
    if sharing > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sharing}"]
        command = [*torchrun, "--no-python", "--", "sh", "-c", AS_MACHINE, *command]
        options["env"] = {**(options.get("env") or os.environ), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):  # torchrun ends in GRACE_S what does not stop, and only it can
                process.wait(GRACE_S if sharing == 1 else 2 * GRACE_S)
            process.kill()
            raise


@contextmanager
def _stops_held_back() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back for a moment; a process that is started meanwhile has them blocked.

    To block them does not suffice: a thread of a library may take one, and Python acts on it in the main thread.
    """
    came: list[int] = []
    handlers = {stop: signal.signal(stop, lambda number, _: came.append(number)) for stop in STOPS}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for stop, handler in handlers.items():
            signal.signal(stop, handler)
        for number in came:
            signal.raise_signal(number)


def _serve(pipe: Connection, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            function, arguments, options = pipe.recv()
            try:
                answer, error = function(*arguments, **options), None
            except Exception as raised:
                answer, error = None, _sendable(raised)
            pipe.send((answer, error))


def _sendable(error: Exception) -> Exception:
    """Return an error, or its words where libraries made it so that it does not survive the way to the parent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
