"""The threads that torch has: whose team is dismissed leaves the processors to others."""

from __future__ import annotations

import threading

import psutil
import pytest
import torch

from lora_rt.core.base import openmp
from support.tiny import Zoo

pytestmark = pytest.mark.skipif(openmp.team() is None, reason="torch has another OpenMP library here")


def work() -> None:
    torch.ones(4_000_000).add_(1)


def test_a_team_is_dismissed_and_gathers_again() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        openmp.dismiss()
        alone = psutil.Process().num_threads()
        for _ in range(2):
            work()
            assert psutil.Process().num_threads() == alone + 2
            openmp.dismiss()
            assert psutil.Process().num_threads() == alone
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_only_visits_leaves_no_team_behind() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        openmp.dismiss()
        found = []

        def visit() -> None:
            with openmp.visiting():
                work()
            found.append(psutil.Process().num_threads())

        visitor = threading.Thread(target=visit)
        alone = psutil.Process().num_threads()
        visitor.start()
        visitor.join()
        assert found == [alone + 1]  # the visitor itself
    finally:
        torch.set_num_threads(before)


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
