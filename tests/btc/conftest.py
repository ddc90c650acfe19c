import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flashlab.btc import prepare as prepare_module
from flashlab.cli import main


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many threads make small matrices slow, and on a busy machine very slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def many_blocks(bars_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set of `prepared` in blocks of 100 bars, 7 blocks a chunk. Read it, never write into it."""
    out = tmp_path_factory.mktemp("many_blocks") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "BLOCK_BARS", 100)
        patch.setattr(prepare_module, "CHUNK_BLOCKS", 7)
        prepare_module.prepare([bars_csv], out=out, context_length=32)
    return out


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
