"""The exports of a vLLM server on disk: whole or not there after a kill, and none removed that a server may name."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lora_rt.errors import LoraRtError
from lora_rt.registry import durable
from support.killing import run_until

pytestmark = pytest.mark.usefixtures("plugin")

CONTENT = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 1000}


def fill(out: Path) -> int:
    """Write an export as the product does: whole or not at all."""
    with durable.new_folder(out) as folder:
        for name, content in CONTENT.items():
            (folder / name).write_bytes(content)
    return sum(map(len, CONTENT.values()))


def cache(folder: Path, most_bytes: int = 10**9) -> Any:
    from lora_rt_vllm.cache import ExportCache

    return ExportCache(folder, most_bytes)


def tidy(folder: Path, most_bytes: int = 10**9) -> Any:
    from lora_rt_vllm.cache import tidy as run

    return run(folder, most_bytes)


def exports(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/[!.]*"))


def is_whole(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


@pytest.mark.slow
def test_an_export_is_whole_or_not_there_wherever_the_process_is_killed(tmp_path: Path) -> None:
    step, killed = 0, []
    survived = False
    while not survived:
        step += 1
        place = tmp_path / str(step)
        survived = run_until(step, lambda place=place: cache(place).get("base/key", fill), (place,))  # type: ignore[misc]
        assert all(is_whole(path) for path in place.glob("*/[!.]*"))
        assert exports(place) == ["key"] or not survived
        killed += [] if survived else [exports(place)]
        again = cache(place)
        assert is_whole(again.get("base/key", fill))
        again.close()
        tidy(place)
        assert exports(place) == ["key"]
        assert list(place.glob("*/.*")) == [], "what the killed one left is gone"
    assert [] in killed
    assert ["key"] in killed


@pytest.mark.slow
def test_tidying_leaves_whole_exports_wherever_it_is_killed(tmp_path: Path) -> None:
    step, killed = 0, []
    survived = False
    while not survived:
        step += 1
        place = tmp_path / str(step)
        made = cache(place)
        for name in ("base/a", "base/b"):
            made.get(name, fill)
        made.close()
        survived = run_until(step, lambda place=place: tidy(place, 0), (place,))  # type: ignore[misc]
        assert all(is_whole(path) for path in place.glob("*/[!.]*"))
        assert exports(place) == [] or not survived
        killed += [] if survived else [exports(place)]
        tidy(place, 0)
        assert list(place.glob("*/*")) == []
    assert ["a", "b"] in killed
    assert [] in killed


def test_nothing_is_removed_while_a_server_runs(tmp_path: Path) -> None:
    running, another = cache(tmp_path), cache(tmp_path)
    named = running.get("base/a", fill)
    another.get("base/b", fill)
    assert tidy(tmp_path, 0) is None
    another.close()
    assert tidy(tmp_path, 0) is None
    assert is_whole(named)
    running.close()
    assert len(tidy(tmp_path, 0)) == 2


def test_a_server_that_was_killed_does_not_hold_its_exports_for_ever(tmp_path: Path) -> None:
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from lora_rt_vllm.cache import ExportCache\n"
        "def make(out): out.mkdir(parents=True); return 0\n"
        "ExportCache(Path(sys.argv[2]), 10**9).get('base/a', make); print('up', flush=True); sys.stdin.read()"
    )
    from lora_rt_vllm import cache as module

    here = str(Path(str(module.__file__)).parents[1])
    command = [sys.executable, "-c", program, here, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "up\n"
        assert tidy(tmp_path, 0) is None
        server.kill()
    assert tidy(tmp_path) == []


def test_those_that_were_used_longest_ago_go_first(tmp_path: Path) -> None:
    made = cache(tmp_path)
    for age, name in enumerate(("c", "b", "a")):
        os.utime(made.get(f"base/{name}", fill), (1000 + age, 1000 + age))
    made.get("base/c", fill)  # asked for again
    made.close()
    tidy(tmp_path, 2100)
    assert exports(tmp_path) == ["a", "c"]


def test_a_full_cache_refuses_what_is_new_and_answers_what_is_there(tmp_path: Path) -> None:
    made = cache(tmp_path, most_bytes=1500)
    first = made.get("base/a", fill)
    made.get("base/b", fill)
    with pytest.raises(LoraRtError) as caught:
        made.get("base/c", fill)
    assert str(caught.value) == (
        "the exports of this server take all of the 1.5e-06 GB that they may, and none can be removed while it runs. "
        "Ask for a composition that it has answered before, or have the server started anew"
    )
    assert made.get("base/a", fill) == first
    made.close()


def test_two_servers_over_one_folder_make_one_export(tmp_path: Path) -> None:
    """Each writes; the second to end finds the first one's and takes that."""
    both, found = threading.Barrier(2, timeout=60), []

    def meet(out: Path) -> int:
        both.wait()
        return fill(out)

    servers = [cache(tmp_path), cache(tmp_path)]
    threads = [threading.Thread(target=lambda one=one: found.append(one.get("base/a", meet))) for one in servers]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "base/a"] * 2
    assert is_whole(found[0])
    for one in servers:
        one.close()
