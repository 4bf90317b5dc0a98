"""What trying a base has shown is remembered for that base alone."""

from __future__ import annotations

import pytest

from lora_rt.core.forward import tried
from lora_rt.core.forward.tried import Tried
from lora_rt.registry import home


def _unasked() -> bool:
    raise AssertionError("it was tried again")


@pytest.mark.parametrize("answer", [True, False])
def test_another_process_takes_the_answer_that_was_found(answer: bool) -> None:
    assert Tried("a base").answer("keeps rows apart", lambda: answer) is answer
    assert Tried("a base").answer("keeps rows apart", _unasked) is answer


def test_another_base_another_question_and_a_model_of_a_caller_are_tried_themselves() -> None:
    Tried("a base").answer("keeps rows apart", lambda: True)
    for other in (Tried("another base"), Tried()):
        assert other.answer("keeps rows apart", lambda: False) is False
    assert Tried("a base").answer("ignores padding", lambda: False) is False
    assert Tried().answer("keeps rows apart", lambda: True) is True


def test_another_release_of_a_library_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    Tried("a base").answer("keeps rows apart", lambda: True)
    monkeypatch.setattr(tried.metadata, "version", lambda _: "99")
    assert Tried("a base").answer("keeps rows apart", lambda: False) is False


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "[" * 100_000])
def test_a_file_that_can_not_be_read_costs_time_alone(text: str) -> None:
    home.home().mkdir(parents=True)
    (home.home() / "tried.json").write_text(text)
    assert Tried("a base").answer("keeps rows apart", lambda: True) is True
    assert Tried("a base").answer("keeps rows apart", _unasked) is True
