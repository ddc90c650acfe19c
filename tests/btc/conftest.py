import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashlab.cli import main


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many threads make small matrices slow, and on a busy machine very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained with the options TINY of the test's module."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", "--data.path", str(prepared), *request.module.TINY.split(), "--run", str(run)]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to do with as one likes."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
