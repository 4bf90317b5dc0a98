"""Facts about numba that the kept machine code stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from lora_rt.core.native import compiled

pytestmark = pytest.mark.skipif(not compiled.is_there(), reason="numba is not installed")


def doubled(x: float) -> float:
    return 2 * x


def test_numba_keeps_what_it_compiles_below_the_folder_that_its_setting_named_when_it_was_decorated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba import config, njit

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    function = njit(cache=True)(doubled)
    monkeypatch.undo()
    assert tmp_path in Path(function._cache.cache_path).parents


def test_numba_asks_the_cache_of_a_function_and_takes_none_for_nothing_kept(tmp_path: Path) -> None:
    from numba.core.caching import Cache
    from numba.core.dispatcher import Dispatcher

    source = inspect.getsource(Dispatcher.compile)
    assert "self._cache.load_overload(" in source
    assert "if cres is not None:" in source
    assert "self._cache.save_overload(" in source
    assert all(callable(getattr(Cache, name)) for name in ("load_overload", "save_overload", "flush"))


def test_a_variable_of_numbas_for_bounds_is_above_the_option_of_a_function() -> None:
    from numba.core import base

    assert "if config.BOUNDSCHECK is not None:\n            return config.BOUNDSCHECK" in inspect.getsource(base)
