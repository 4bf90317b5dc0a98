"""The threads that torch has: whose team is dismissed leaves the processors to others."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from lora_rt.core.native import openmp
from support.tiny import Zoo

pytestmark = pytest.mark.skipif(openmp.team() is None, reason="torch has another OpenMP library here")


ALONE = """
import threading, time
import psutil, torch
from lora_rt.core.native import openmp

def work():
    torch.ones(4_000_000).add_(1)

def become(count):
    end = time.monotonic() + 10  # a thread that was ended takes a moment to go
    while psutil.Process().num_threads() != count and time.monotonic() < end:
        time.sleep(0.01)
    return psutil.Process().num_threads() == count

def visit():
    with openmp.visiting():
        work()
    found.append(become(alone + 1))  # the visitor itself

torch.set_num_threads(3)
alone, found = psutil.Process().num_threads(), []
for _ in range(2):
    work()
    found.append(become(alone + 2))
    openmp.dismiss()
    found.append(become(alone))
found.append(torch.get_num_threads() == 3)
visitor = threading.Thread(target=visit)
visitor.start()
visitor.join()
print(found)
"""


@pytest.mark.slow
def test_a_team_is_dismissed_and_gathers_again_and_a_thread_that_only_visits_leaves_none_behind() -> None:
    told = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([True] * 6)


def test_without_that_library_nothing_is_dismissed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_library", lambda: None)
    openmp.dismiss()


@pytest.mark.slow
def test_an_answer_leaves_the_processors_to_the_next_one_s_thread(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = zoo.runtime("llama", fresh=True)
    left: list[int] = []
    monkeypatch.setattr(openmp, "dismiss", lambda: left.append(threading.get_ident()))
    runtime.generate("a", max_new_tokens=2)
    assert left == [threading.get_ident()]
    stream = runtime.stream("a", max_new_tokens=2)
    next(iter(stream))
    assert len(left) == 1  # it goes on
    list(stream)
    assert len(left) == 2
