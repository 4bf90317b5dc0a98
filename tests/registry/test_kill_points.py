"""A SIGKILL at any step leaves the old state or the new one, the next command works, and left-overs are collected."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_rt.registry.files import combined
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.lock import Locked, read_lock, write_lock
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.reference import Reference
from lora_rt.registry.resolved import changes
from lora_rt.registry.store import Store
from support.adapters import adapter_files, write_adapter
from support.hub import LocalHub
from support.killing import run_until

pytestmark = pytest.mark.slow

REPO = Reference.parse("someone/emotion")
State = dict[tuple[str, str], str]


def _publish(home: Path, seed: int, name: str = "emotion") -> None:
    store = Store(home)
    with store.staging() as staged:
        store.publish(write_adapter(staged, adapter_files(seed=seed)), name, source=f"seed {seed}", revision=None)


def _state(home: Path) -> State:
    """What is installed; every adapter of it must be whole."""
    found = Store(home).installed()
    assert [changes(item.folder, item.files) for item in found] == [[] for _ in found]
    return {(item.name, item.source): item.sha256 for item in found}


@dataclass(frozen=True)
class Story:
    """How a home comes to be, and what is done to it then."""

    before: Callable[[Path], object]
    action: Callable[[Path], object]
    stride: int = 1


# Every step of the first publish; the other ones go through the same code in another order, so every third is enough.
STORIES = {
    "first publish": Story(lambda home: None, lambda home: _publish(home, 1)),
    "publish over an old one": Story(lambda home: _publish(home, 1), lambda home: _publish(home, 2), 3),
    "publish the same again": Story(lambda home: _publish(home, 1), lambda home: _publish(home, 1, "other"), 3),
    "remove": Story(lambda home: _publish(home, 1), lambda home: Store(home).remove("emotion")),
    "collect": Story(lambda home: _leave_behind(home), lambda home: Store(home).collect()),
    "pull": Story(lambda home: None, lambda home: pull(Store(home), REPO), 3),
}


def _leave_behind(home: Path) -> None:
    """A staging folder of a process that is gone, and an object without a record."""
    _publish(home, 1)
    write_adapter(home / "store" / "objects" / ("0" * 64))
    write_adapter(home / "store" / "staging" / "gone")


@pytest.mark.parametrize("name", STORIES)
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(name: str, hub: LocalHub, memory: Path) -> None:
    story = STORIES[name]
    hub.commit(REPO.target, adapter_files(seed=3))
    cache = Path(os.environ["HF_HOME"])
    template = memory / "template"
    template.mkdir()
    story.before(template)
    old = _state(template)
    finished = shutil.copytree(template, memory / "finished")
    story.action(finished)
    new = _state(finished)
    left_over = len(Store(template).orphans())
    assert (old, left_over) != (new, 0)
    step, killed = 1 - story.stride, []
    while True:
        step += story.stride
        home = shutil.copytree(template, memory / str(step))
        shutil.rmtree(cache, ignore_errors=True)
        lived = run_until(step, lambda home=home: story.action(home), (home, cache))
        state = _state(home)
        assert state in (old, new), f"killed at step {step}"
        seen = (state, len(Store(home).orphans()))
        Store(home).collect()
        assert Store(home).orphans() == []
        assert _state(home) == state
        if name != "remove" or state == old:
            story.action(home)
        assert _state(home) == new, f"after a kill at step {step}"
        shutil.rmtree(home)
        if lived:
            break
        killed.append(seen)
    assert seen == (new, 0), "the action did not do what it is for"
    # Kills before what makes it so and after it, else nothing was killed at a step that matters.
    assert (old, left_over) in killed
    assert new in [state for state, left in killed if old != new or left < left_over]


def test_a_kill_while_the_lock_is_written_leaves_the_old_lock_or_the_new(tmp_path: Path) -> None:
    none = combined({})
    old = [Locked("emotion", "", "./here", "", none, {})]
    new = [*old, Locked("logic", "", "./there", "", none, {})]
    step, killed = 0, []
    while True:
        step += 1
        write_lock(tmp_path, old)
        lived = run_until(step, lambda: write_lock(tmp_path, new), (tmp_path,))
        found = read_lock(tmp_path)
        assert found in (old, new)
        write_lock(tmp_path, [])
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        if lived:
            break
        killed.append(found)
    assert found == new
    assert old in killed
    assert new in killed


def test_a_full_disk_leaves_the_old_state(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(home, 1)
    old = _state(home)
    fsync = os.fsync
    refused = 0
    while True:
        calls: list[int] = []

        def full(descriptor: int, calls: list[int] = calls, last: int = refused) -> None:
            calls.append(descriptor)
            if len(calls) > last:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with contextlib.suppress(OSError):
            _publish(home, 2)
        monkeypatch.setattr(os, "fsync", fsync)
        if len(calls) <= refused:  # the disk held out to the end
            break
        refused += 1
        # What was written before the last step may stand: it is then the new state, whole.
        state = _state(home)
        Store(home).collect()
        assert Store(home).orphans() == []
        assert _state(home) == state
        if state != old:
            _publish(home, 2)
            assert _state(home) == state, "neither the old state nor the new one"
        _publish(home, 1)
        assert _state(home) == old
    assert refused > 3
    assert _state(home) != old
