"""Writes that survive: what Windows asks for, and whose unfinished files may be removed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_rt.registry import durable

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
