import signal
from pathlib import Path

import pytest

from flashlab.btc.prepare import prepare
from flashlab.btc.simulate import simulate_bars


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # slow, and most tests of other things can do without

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Hear Ctrl-C, which a shell lets its background jobs ignore: tests send it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_tuned_table(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `flashlab tune` measured on this machine from changing what `auto` chooses in tests."""
    monkeypatch.setenv("FLASHLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def bars_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three days of simulated minute bars, with the gaps that they come with."""
    path = tmp_path_factory.mktemp("bars") / "bars.csv"
    simulate_bars(3, seed=0).to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def prepared(bars_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set prepared from `bars_csv` for a context of 32 bars. Read it, never write into it."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    prepare([bars_csv], out=out, context_length=32)
    return out
