"""Writes that survive: what Windows asks for, whose unfinished files may be removed, folders that are there or not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_rt.registry import durable
from lora_rt.registry.errors import OccupiedFolderError, StorageError, StoreError
from lora_rt.registry.store import Store
from support.adapters import adapter_files, write_adapter

fcntl = pytest.importorskip("fcntl")


def test_a_file_that_windows_is_to_bring_to_the_disk_is_opened_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    file = tmp_path / "file"
    file.write_text("content")
    with monkeypatch.context() as windows:  # where no path can be made meanwhile
        windows.setattr(os, "name", "nt")
        windows.setattr(os, "fsync", fsync)
        durable.sync_file(file)


def test_unfinished_files_are_abandoned_whose_writer_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    writers = {str(os.getpid()): False, str(gone.pid): True, "nobody": True, "9" * 40: False}
    for writer in writers:
        (tmp_path / f".x.{writer}.partial").touch()
    found = {path.name.split(".")[2] for path in durable.abandoned(tmp_path)}
    assert found == {writer for writer, left in writers.items() if left}


def fill(target: Path) -> None:
    durable.check_new_folder(target)
    with durable.new_folder(target) as folder:
        for name in ("adapter_config.json", "adapter_model.safetensors", "register.json"):
            (folder / name).write_text(name)


@pytest.mark.parametrize("named", ["there", "link", ".", "new", "a/new", "x" * 250])
def test_a_folder_that_is_there_and_empty_is_filled_as_a_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "link").symlink_to(there)
    monkeypatch.chdir(there if named == "." else tmp_path)
    before = there.stat()
    fill(Path(named))
    assert {path.name: path.read_text() for path in Path(named).iterdir()} == {
        name: name for name in ("adapter_config.json", "adapter_model.safetensors", "register.json")
    }
    after = there.stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode), "it may be a mount point, or somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"there", "link", named.partition("/")[0]} - {"."}
    )


def test_a_folder_is_taken_for_an_adapter_when_all_of_it_is_there_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name == "adapter_config.json":
            seen.append(sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    seen: list[list[str]] = []
    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path)
    assert seen == [["adapter_model.safetensors", "register.json"]]
    assert list(tmp_path.iterdir()) == []


def test_what_somebody_else_has_put_there_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(OccupiedFolderError, match="it holds theirs"), durable.new_folder(tmp_path):
        (tmp_path / "theirs").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_a_killed_run_has_left_in_a_folder_is_named(tmp_path: Path) -> None:
    filling = durable.new_folder(tmp_path)
    left = filling.__enter__()
    with pytest.raises(OccupiedFolderError, match=rf"it holds {left.name}\. .*remove what a run"):
        durable.check_new_folder(tmp_path)
    filling.__exit__(None, None, None)


def test_a_folder_gives_way_to_a_whole_one_alone(tmp_path: Path) -> None:
    target, left = tmp_path / "int4", tmp_path / ".lora-rt-unfinished-int4"
    for folder in (target, left):
        folder.mkdir()
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), durable.replaced_folder(target) as folder:
        (folder / "new").write_text(str(1 / 0))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["int4", "int4/old"]
    with durable.replaced_folder(target) as folder:
        (folder / "new").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["int4", "int4/new"]


@pytest.mark.parametrize("named", ["x" * 256, "a/" + "x" * 256, "file", "file/x", "nowhere"])
def test_a_folder_that_can_not_be_made_is_refused_beforehand(tmp_path: Path, named: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises((OccupiedFolderError, StorageError)):
        durable.check_new_folder(tmp_path / named)


def test_objects_on_another_file_system_than_the_store_are_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr(os, "rename", rename)
    with store.staging() as staged, pytest.raises(StoreError, match="objects lies on another file system") as error:
        store.publish(write_adapter(staged, adapter_files()), "mood", source="trained here", revision=None)
    assert "set LORA_RT_HOME to a folder there" in error.value.next_step
    assert store.installed() == []
