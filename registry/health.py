"""What `lora-rt doctor` says about the registry's part: home, bases, shipped adapters, records, left-overs, the Hub."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_rt.errors import LoraRtError
from lora_rt.registry import home as home_folders
from lora_rt.registry.errors import ProjectError
from lora_rt.registry.hub import library
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.lock import read_locked_compositions
from lora_rt.registry.packages import Unreadable, unreadable
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.records import Damaged, Record, read
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import changes
from lora_rt.registry.shipped import Shipped, shipped
from lora_rt.registry.sync import check_lock
from lora_rt.registry.verify import COMPOSITION, check_composition


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: "ok", "note" (works, worth knowing) or "broken", with what to do about it."""

    name: str
    status: Literal["ok", "note", "broken"]
    detail: str
    todo: str = ""


def registry_checks(registry: Registry, *, clean: bool = False) -> list[Check]:
    """Every finding about what the registry keeps; `clean` removes left-overs first. No requests."""
    checks = [_home(registry.store.root.parent), *_bases(registry.store.root.parent)]
    checks += [_damaged(item) for item in unreadable()]
    checks += [_shipped(item) for item in shipped()]
    checks += [*_records(registry), *_compositions(registry), *_project(registry), _leftovers(registry, clean), _hub()]
    return checks


def _home(home: Path) -> Check:
    place = next(path for path in (home, *home.parents) if path.exists())
    free = f"{shutil.disk_usage(place).free / 2**30:.0f} GiB free"
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check("home", "broken", f"{home} can not be written", "Set LORA_RT_HOME to a folder of yours")
    return Check("home", "ok", f"{home}, {free}")


def _bases(home: Path) -> list[Check]:
    folder = home_folders.bases(home)
    kept = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not kept:
        return [Check("bases", "note", "none is kept yet", "The first lora-rt compose fetches and quantizes one")]
    return [Check(f"base {path.name}", "ok", f"{_size(path):.0f} MiB in {path}") for path in kept]


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def _damaged(item: Unreadable) -> Check:
    detail = f"its entry_points.txt in {item.folder} is damaged, and other packages fail because of it: {item.reason}"
    return Check(f"package {item.package}", "broken", detail, item.todo)


def _shipped(item: Shipped) -> Check:
    name = f"shipped {item.name}"
    if item.folder is None:
        return Check(name, "note", f"{item.package}: {item.reason}", f"Install {item.package.split()[0]} again")
    try:
        inspect_adapter(item.folder, name=item.name)
    except LoraRtError as error:
        return Check(name, "broken", f"{item.package}: {error.message}", f"Install {item.package.split()[0]} again")
    return Check(name, "ok", f"{item.package}, {item.folder}")


def _records(registry: Registry) -> list[Check]:
    checks = []
    for path in registry.store.records.paths():
        record = read(path)
        if isinstance(record, Damaged):
            checks.append(Check(f"record {record.name}", "broken", record.message, record.todo))
        if not isinstance(record, Record):
            continue
        problems = changes(registry.store.objects / record.sha256, record.files)
        status: Literal["ok", "broken"] = "broken" if problems else "ok"
        todo = f"lora-rt verify {record.name}" if problems else ""
        checks.append(Check(f"adapter {record.name}", status, "; ".join([record.source, *problems]), todo))
    return checks


def _compositions(registry: Registry) -> list[Check]:
    try:
        names = registry.compositions.names()
    except ProjectError:
        return []  # which is said of the project
    checks = []
    for name in names:
        verdict = check_composition(registry, name)
        status: Literal["ok", "note", "broken"] = "broken" if verdict.problems else "note" if verdict.notes else "ok"
        detail = "; ".join([*verdict.problems, *verdict.notes]) or verdict.source.removeprefix(f"{COMPOSITION} ")
        checks.append(Check(f"{COMPOSITION} {name}", status, detail, verdict.todo))
    return checks


def _project(registry: Registry) -> list[Check]:
    try:
        if not registry.pinned.sources() and not read_locked_compositions(registry.folder):
            return []
        problems = check_lock(registry)
    except LoraRtError as error:
        return [Check("project", "broken", error.message, error.next_step)]
    if problems:
        return [Check("project", "note", "; ".join(problems), "lora-rt lock")]
    return [Check("project", "ok", f"{LOCK_FILE} fits")]


def _leftovers(registry: Registry, clean: bool) -> Check:
    gone = registry.store.collect() if clean else []
    left = registry.store.orphans()
    if gone:
        return Check("left-overs", "ok", f"{len(gone)} removed")
    if left:
        return Check("left-overs", "note", f"{len(left)} of killed processes", "lora-rt doctor --clean")
    return Check("left-overs", "ok", "none")


def _hub() -> Check:
    constants = library.constants
    login = "logged in" if library.get_token() else "no token; public repositories work"
    offline = ", offline by HF_HUB_OFFLINE" if constants.is_offline_mode() else ""
    return Check("hub", "ok", f"{constants.ENDPOINT}, {login}{offline}")
