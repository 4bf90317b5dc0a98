"""What every test stands on: no network but a Hub on the loopback, and no home but a temporary one.

The Hub's client reads its environment when it is imported, so this happens before anything else is.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from support.features import left_out
from support.hub import LocalHub

if TYPE_CHECKING:
    from support.forks import Forks
    from support.tiny import Zoo

_HUB = LocalHub()
_HUB.__enter__()
_numbers = itertools.count()
_FOLDER = tempfile.TemporaryDirectory(prefix="lora-rt-tests-", ignore_cleanup_errors=True)
atexit.register(_FOLDER.cleanup)

for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_", "LORA_RT_"))]:
    del os.environ[_name]
os.environ |= {
    "HF_ENDPOINT": _HUB.endpoint,
    "HF_HOME": str(Path(_FOLDER.name) / "hf"),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "LORA_RT_HOME": str(Path(_FOLDER.name) / "home"),
    "OMP_NUM_THREADS": "1",  # as many processes as cores run tests already
}


def pytest_collectstart(collector: pytest.Collector) -> None:
    """The quick tests import torch as the command line does, without its compilers; the whole suite as programs do."""
    if collector.config.option.markexpr == "not slow":
        from lora_rt.core.cli import lean

        lean.process_is_ours = True
        lean.import_lean()
        lean.process_is_ours = False
        import torch.distributed.tensor  # noqa: F401  # PEFT's own layers, which tests hold ours against, ask for it


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The quick tests do not even import the files of slow tests alone."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return True if "\npytestmark = pytest.mark.slow\n" in collection_path.read_text(encoding="utf-8") else None


OURS = ("base", "plugins", "registry", "requests", "serving", "training")
LOGGERS = ("lora_rt", *(f"lora_rt.{name}" for name in OURS), "bitsandbytes.backends.cpu.ops", "uvicorn.error")
LONGEST = (
    "registers/test_shipped.py",
    "base/test_prepare.py",
    "training/test_processes.py",
    "plugins/test_packages.py",
    "registry/test_kill_points.py",
    "registry/test_fuzz.py",
    "serving/test_contract.py",
    "benchmark/test_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, then those of slow tests alone, so that processes end at about the same time."""
    quick = {item.path for item in items if not item.get_closest_marker("slow")}
    longest = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (longest.get(item.path, len(longest)), item.path in quick))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Which features of a processor the tests missed: what they hold of these has to be seen on another machine."""
    skipped = {report.nodeid: report.longrepr for report in terminalreporter.stats.get("skipped", ())}
    if line := left_out(str(reason) for reason in skipped.values()):
        terminalreporter.write_line(f"{line}: see CONTRIBUTING.md")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """No test sees what another left in the process: a command line that ran in it sets variables, and hears notes."""
    environment, folder = dict(os.environ), os.getcwd()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    heard = [(logger.level, logger.handlers[:], logger.filters[:]) for logger in loggers]
    random.seed(0)
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
    yield
    if os.environ != environment:
        os.environ.clear()
        os.environ.update(environment)
    for logger, (level, handlers, filters) in zip(loggers, heard, strict=True):
        logger.setLevel(level)
        logger.handlers[:], logger.filters[:] = handlers, filters
    assert os.getcwd() == folder
    if torch is not None:
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == (torch.float32, True)


@pytest.fixture(autouse=True)
def one_place_for_kernels(own_process: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compiled is found again by other processes and later runs; it takes up to half a minute each."""
    cache = getattr(request.config, "cache", None)
    if cache is not None and "native" not in request.path.parts:
        from lora_rt.registry import home

        monkeypatch.setattr(home, "kernels", lambda: cache.mkdir("lora-rt-kernels"))


@pytest.fixture(autouse=True)
def own_home(own_process: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one left in the home: `home` in its `tmp_path`, where it has one.

    To make a folder for each of thousands of tests takes longer than many of them do.
    """
    if "tmp_path" in request.fixturenames:
        monkeypatch.setenv("LORA_RT_HOME", str(request.getfixturevalue("tmp_path") / "home"))
        yield
        return
    home = Path(_FOLDER.name) / f"home-{next(_numbers)}"
    monkeypatch.setenv("LORA_RT_HOME", str(home))
    yield
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def own_folder() -> Iterator[None]:
    """No test leaves a file or a folder where the tests were started."""
    before = set(os.listdir())
    yield
    assert sorted(name for name in set(os.listdir()) - before if not name.startswith(".")) == []


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny models and adapters, made once for all tests. torch gets one thread: their matrices are too small."""
    import torch

    from support.tiny import Zoo

    torch.set_num_threads(1)
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """`light(["compose", "emotion"])`: the command line in a process of its own, without torch at its start."""
    from support.forks import forks

    with forks(tmp_path_factory.mktemp("light")) as started:
        yield started


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The same with torch at its start: where a process of its own is wanted, and what it imports is not the point.

    It lives in a virtual environment of its own, so that packages can be installed there.
    """
    from support.forks import WARM, forks, fresh_environment

    python = fresh_environment(tmp_path_factory.mktemp("environment"))
    with forks(tmp_path_factory.mktemp("warm"), WARM, python) as started:
        yield started


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """An empty Hub, the one that the client asks, and a client that remembers nothing."""
    _HUB.reset()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    yield _HUB
    _HUB.reset()
