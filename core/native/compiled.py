"""Loops that numba compiles for the processor at hand, once: they are kept in the home for every later process."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_rt.registry import home
from lora_rt.version import __version__

_SETTING = threading.RLock()  # numba is told of a folder by a setting of its own
# An index out of bounds would end one thread of a team, and the others would wait for it for ever.
_OPTIONS = {"error_model": "numpy", "boundscheck": False}
# A function that stays one of its own in the machine code is a weak symbol: whichever file brought it first is called,
# and that one may have been optimized otherwise. So it would depend on what a process compiled or loaded before.
_INNER = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}


@cache
def is_there() -> bool:
    """Whether numba is installed."""
    return find_spec("numba") is not None


def compiled(
    *, any_order: bool = False, kept: bool = True, uses: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that numba compiles when it is first called.

    Args:
        any_order: sums may be made in any order. Neither NaN nor infinity is assumed away.
        kept: what was compiled is remembered. What others call is not: it is built into each of them.
        uses: other files whose functions or numbers are built into it.
    """
    options: dict[str, Any] = {"nogil": True, **_OPTIONS}
    if any_order:
        options["fastmath"] = {"reassoc", "contract", "nsz"}

    def decorate(function: Callable[..., Any]) -> Any:
        return _remembered(function, options, uses) if kept else _numba().njit(**options, **_INNER)(function)

    return decorate


def callback(signature: str, uses: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function that numba compiles at once, for C to call: its `address` is where it lies.

    Args:
        signature: in numba's words.
        uses: other files whose functions or numbers are built into it.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        config = _numba().config

        def made(kept: bool) -> Any:
            return _numba().cfunc(signature, cache=kept, **_OPTIONS)(function)

        file = Path(function.__code__.co_filename)
        folder = _folder(file, *map(Path, uses))
        if not _can_write(folder):
            return made(kept=False)
        with _SETTING:
            before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
            checked, config.BOUNDSCHECK = config.BOUNDSCHECK, 0  # a variable of numba's is above its options
            try:
                return made(kept=True)
            except Exception:  # of a damaged file, whatever its bytes mean, or a full disk; or it can't be compiled
                found = made(kept=False)
                for damaged in folder.rglob(f"{file.stem}.*"):
                    with suppress(OSError):
                        damaged.unlink()
                return found
            finally:
                config.CACHE_DIR, config.BOUNDSCHECK = before, checked

    return decorate


def _numba() -> Any:
    """It takes a second to import."""
    import numba

    return numba


def _remembered(function: Any, options: dict[str, Any], uses: Sequence[str]) -> Any:
    """The function, which is looked for in the home when it is first called, and put there."""
    config, njit = _numba().config, _numba().njit
    folder = _folder(Path(function.__code__.co_filename), *map(Path, uses))
    if not _can_write(folder):
        return njit(**options)(function)
    with _SETTING:
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
        try:
            return _sturdy(njit(cache=True, **options)(function))
        finally:
            config.CACHE_DIR = before


def _folder(*files: Path) -> Path:
    """Where what is compiled of files is kept: numba sees neither options nor a change that keeps size and date."""
    sources = b"".join(path.read_bytes() for path in (Path(__file__), *files))
    return home.kernels() / f"{__version__}-{hashlib.sha256(sources).hexdigest()[:8]}"


def _sturdy(dispatcher: Any) -> Any:
    """What can't be read is compiled again, and what can't be written is lost: of numba both would end the call."""
    kept = dispatcher._cache
    load, save = kept.load_overload, kept.save_overload

    def loaded(*given: Any) -> Any:
        try:
            return load(*given)
        except Exception:  # of a damaged file, whatever its bytes mean
            with suppress(OSError):
                kept.flush()
            return None

    def saved(*given: Any) -> None:
        with suppress(Exception):
            save(*given)

    kept.load_overload, kept.save_overload = loaded, saved
    return dispatcher


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
