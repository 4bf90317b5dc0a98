"""Adapters that installed packages ship: entry-point group `lora_rt.adapters`, a name and a folder.

    [project.entry-points."lora_rt.adapters"]
    emotion = "my_package.adapters.emotion"      # the folder my_package/adapters/emotion

and, in the group `lora_rt.compositions`, folders of named compositions (see `lora_rt.registry.compositions`).

The value is never imported. Its folder is found by walking down from the package's place on disk.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

from lora_rt.registry.files import CONFIG
from lora_rt.registry.packages import package_of, points_of
from lora_rt.registry.reference import name_problem

GROUP = "lora_rt.adapters"
COMPOSITIONS = "lora_rt.compositions"
COMPOSITION = "composition.json"
OWN_PACKAGE = "lora-rt"


@dataclass(frozen=True, slots=True)
class Shipped:
    """One entry point: the folder of the adapter, or why there is none."""

    name: str
    package: str
    folder: Path | None
    reason: str


def shipped() -> list[Shipped]:
    """Every entry point of the group, by name and package, usable or not; `doctor` names packages that are damaged.

    Our own come first among those of one name: no package that is installed beside us changes what they mean.
    """
    return _all(GROUP, CONFIG)


def shipped_compositions() -> list[Shipped]:
    """The same for the named compositions that packages ship."""
    return _all(COMPOSITIONS, COMPOSITION)


def _all(group: str, file: str) -> list[Shipped]:
    found = [_read(point, file) for point in points_of(group)[0]]
    return sorted(found, key=lambda item: (item.name, item.package.split(" ")[0] != OWN_PACKAGE, item.package))


def _read(point: EntryPoint, file: str) -> Shipped:
    package = " ".join(package_of(point)).strip()
    for problem in name_problem(point.name):
        return Shipped(point.name, package, None, problem)
    if not all(part.isidentifier() or part.replace("-", "_").isidentifier() for part in point.value.split(".")):
        return Shipped(point.name, package, None, f"{point.value!r} is not a dotted path of a folder")
    for folder in _places(point.value):
        if (folder / file).is_file():
            return Shipped(point.name, package, _without_links(folder, file), "")
    return Shipped(point.name, package, None, f"{point.value} has no {file}")


def _places(dotted: str) -> list[Path]:
    top, *rest = dotted.split(".")
    places = [place.joinpath(*rest) for place in _locations(top)]
    if top == "lora_rt":
        # An editable install of our own may map our folders one by one; importing our own packages is harmless.
        parent, _, name = dotted.rpartition(".")
        places += [place / name for place in _locations(parent)]
        places += [place.joinpath(*rest[1:]) for place in _locations(f"{top}.{rest[0]}")] if rest else []
    return places


def _locations(package: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return []
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _without_links(folder: Path, file: str) -> Path:
    """The folder where the files really lie: an editable install links every file of a package one by one."""
    real = Path(os.path.realpath(folder / file)).parent
    return real if real.name == folder.name else folder
