"""What the tests of plugins share."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from lora_rt.plugins.manager import loading

Install = Callable[..., list[EntryPoint]]


@pytest.fixture
def ours() -> EntryPoint:
    """The entry point of a built-in mode, as our own package states it."""
    return next(point for point in loading.installed()[0] if point.name == "output-only")


@pytest.fixture
def installed(ours: EntryPoint, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes this process believe that some plugins are installed beside output-only."""

    def install(*points: EntryPoint) -> list[EntryPoint]:
        everything = [*points, ours]
        monkeypatch.setattr(loading, "installed", lambda: (everything, []))
        return everything

    return install
