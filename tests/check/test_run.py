"""Workers contain what a backend does to its process."""

import os
import signal

import pytest
import torch

from flashlab.check import run
from flashlab.check.cases import Case
from flashlab.check.judge import Verdict

DEADLY = Case(lengths="37x37")
TASKS = [run.Task(Case(lengths="1x1"), ("standard",)), run.Task(DEADLY, ("standard", "sdpa_math"))]


def die_in_one_case(tasks, device):
    """Stand in for `judge_all`, in the worker."""
    rows = []
    for case, backends in tasks:
        for backend in backends:
            if (case, backend) == (DEADLY, "sdpa_math"):
                os.kill(os.getpid(), signal.SIGSEGV)
            rows.append(run.Row(case, backend, Verdict("ok", None, {})))
    return rows


def lose_the_device(tasks, device):
    if "sdpa_math" in tasks[0].backends:
        raise run.DeviceLost("raised AcceleratorError: an illegal memory access was encountered")
    return die_in_one_case(tasks, device)


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [(die_in_one_case, "its process was ended by SIGSEGV"), (lose_the_device, "raised AcceleratorError: an illegal")],
)
def test_one_backend_that_breaks_its_process_breaks_no_other_row(stand_in, reason, monkeypatch):
    monkeypatch.setattr(run, "judge_all", stand_in)
    monkeypatch.setattr(run, "_num_workers", lambda device: 2)
    rows = {(case, name): verdict for case, name, verdict in run.run(TASKS, torch.device("cuda"))}
    assert len(rows) == 3
    broken = rows.pop((DEADLY, "sdpa_math"))
    assert broken.status == "wrong"
    assert broken.reason.startswith(reason)
    assert {verdict.status for verdict in rows.values()} == {"ok"}
