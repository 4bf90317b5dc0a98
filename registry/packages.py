"""What installed packages offer in a group of entry points, read so that one damaged package does not hide the rest."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from typing import Any

_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A package whose entry points can't be read, and why."""

    package: str
    version: str
    folder: str
    reason: str

    @property
    def todo(self) -> str:
        """How to get rid of it."""
        if self.package == _UNKNOWN:
            return f"Remove the damaged package from {self.folder}"
        return f"python -m pip uninstall {self.package}"


def points_of(group: str) -> tuple[list[EntryPoint], list[Unreadable]]:
    """Every entry point of the group, and the packages whose entry points can't be read."""
    try:
        return list(_all(tuple(map(_age, sys.path))).select(group=group)), []
    except Exception:  # of whatever kind, since it is a stranger's file that can't be read
        # One malformed entry_points.txt anywhere on the path fails the whole query: ask package by package.
        return one_by_one(distributions(), group)


@lru_cache(maxsize=1)
def _all(_ages: object) -> Any:
    """Of every package, until one comes or goes: a command asks a dozen times, and each time takes 25 ms.

    EntryPoints; before Python 3.12 it has another type, whose `select` does the same.
    """
    return entry_points()


def _age(folder: str) -> tuple[str, int]:
    try:
        return folder, os.stat(folder or ".").st_mtime_ns
    except OSError:
        return folder, 0


def one_by_one(packages: Iterable[Distribution], group: str) -> tuple[list[EntryPoint], list[Unreadable]]:
    """`points_of` these packages, each asked alone; of several versions of one, the first on the path."""
    points: list[EntryPoint] = []
    unreadable: list[Unreadable] = []
    seen: set[str] = set()
    for package in packages:
        name, version = identity(package)
        if canonical(name) in seen:  # a later folder of the path holds another version, which Python does not use
            continue
        seen.add(canonical(name))
        try:
            points += package.entry_points.select(group=group)
        except Exception as error:
            unreadable.append(
                Unreadable(name, version, str(package.locate_file("")), f"{type(error).__name__}: {error}")
            )
    return points, unreadable


def unreadable() -> list[Unreadable]:
    """Every installed package whose entry points can't be read."""
    return points_of("")[1]


def canonical(name: str) -> str:
    """A package's name in the form in which two spellings of it are equal (PyPA's name normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def package_of(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the package that brings an entry point."""
    return identity(point.dist) if point.dist is not None else (_UNKNOWN, "")


@lru_cache(maxsize=1024)
def identity(package: Distribution) -> tuple[str, str]:
    """Name and version; a package with damaged metadata has neither.

    Remembered for each object that `distributions` has found: a command asks fifty times, and a long description takes
    4 ms to parse.
    """
    try:
        about = package.metadata
        return str(about["Name"] or _UNKNOWN), str(about["Version"] or "")
    except Exception as error:
        return _UNKNOWN, f"({type(error).__name__} in its metadata)"
