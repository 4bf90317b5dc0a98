"""The threads of torch: the OpenMP library that it has loaded runs functions of ours on the same ones.

A process may have several such libraries (sentencepiece brings one, numba may), and two pools would fight over the same
cores: a step of a model took up to six times as long.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Team(NamedTuple):
    """GNU OpenMP's functions: to run a function by a team, and where those lie that its threads call."""

    run: Any
    barrier: int
    number: int
    size: int


@cache
def team() -> Team | None:
    """The functions of torch's own library; None where it uses another one than GNU's."""
    library = _library()
    try:
        run = library.GOMP_parallel
        inside = library.GOMP_barrier, library.omp_get_thread_num, library.omp_get_num_threads
    except AttributeError:
        return None
    run.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    run.restype = None
    return Team(run, *(ctypes.cast(one, ctypes.c_void_p).value or 0 for one in inside))


def run(together: Team | None, address: int, arguments: Any, threads: int) -> None:
    """Run a C function of one pointer by so many threads, or by fewer: it has to ask by how many.

    Args:
        together: what `team` gives; by one thread where it is None.
        address: of the function.
        arguments: ctypes', or the address where they lie; they have to stay there until this returns.
    """
    if threads > 1 and together is not None:
        together.run(address, arguments, threads, 0)
    else:
        _function(address)(arguments)


@contextmanager
def visiting() -> Iterator[None]:
    """Around work of a thread that will not go on with it: in the end its team is dismissed.

    Every thread that begins such work gets a team of its own, which stays until that thread ends. Of more threads than
    processors none waits for the others at a barrier, but falls asleep: a step meets some three hundred barriers, and
    one of a single row took a third longer beside a thread that had only loaded the model.
    """
    try:
        yield
    finally:
        dismiss()


def dismiss() -> None:
    """End the team of the calling thread, which gets another one when it needs one (0.1 ms); not inside of its work."""
    pause = getattr(_library(), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


@cache
def _library() -> Any:
    """Torch's own library; None where it uses another one than GNU's."""
    folder = Path(torch.__file__).parent
    brought = sorted([*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")])
    try:
        return ctypes.CDLL(str(brought[0]), os.RTLD_NOLOAD | os.RTLD_NOW)
    except (IndexError, OSError):
        return None


_SOFT = 1  # of OpenMP's omp_pause_resource_t: what threads keep for themselves stays
_function = cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))
