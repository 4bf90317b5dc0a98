"""Data in the usual forms is read as scene and text; what is wrong with a line is said by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.training.data import read_pairs
from lora_rt.core.training.sources import DataError

FIELDS = ("scene", "text")
ASK = {"role": "user", "content": "rain?"}
SAY = {"role": "assistant", "content": "It rains."}
TOLD = {"role": "system", "content": "be kind"}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(line if line == "\n" else json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"scene": "rain?", "text": "It rains."},
        {"messages": [ASK, SAY]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "rain?"}]}, SAY]},
        {"conversations": [{"from": "human", "value": "rain?"}, {"from": "gpt", "value": "It rains."}]},
        {"instruction": "rain?", "output": "It rains."},
        {"instruction": "rain?", "input": "", "output": "It rains."},
        {"prompt": "rain?", "completion": "It rains."},
        {"prompt": [ASK], "completion": [SAY]},
    ],
    ids=["ours", "messages", "parts", "sharegpt", "alpaca", "alpaca without input", "completion", "trl"],
)
@pytest.mark.parametrize("chats", [True, False])
def test_every_form_gives_the_same_example(tmp_path: Path, line: dict[str, Any], chats: bool) -> None:
    (found,) = read_pairs(written(tmp_path / "d.jsonl", {**line, "scene_type": "body"}), FIELDS, chats=chats)
    assert found == {"scene": "rain?", "text": "It rains.", "scene_type": "body"}


def test_an_input_stands_behind_its_instruction(tmp_path: Path) -> None:
    line = {"instruction": "Translate:", "input": "rain", "output": "дождь"}
    (found,) = read_pairs(written(tmp_path / "d.jsonl", line), FIELDS)
    assert found == {"scene": "Translate:\n\nrain", "text": "дождь"}


def test_a_longer_chat_is_a_prompt_of_messages_where_the_mode_reads_chats_and_refused_elsewhere(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"messages": [TOLD, ASK, SAY, ASK, SAY]})
    (found,) = read_pairs(path, FIELDS, chats=True)
    assert found == {"scene": [TOLD, ASK, SAY, ASK], "text": "It rains."}
    with pytest.raises(DataError) as caught:
        read_pairs(path, FIELDS)
    assert "line 1" in caught.value.problems[0]
    assert "5 messages; this mode reads one of the user and its answer" in caught.value.problems[0]


def test_the_fields_of_a_mode_decide_and_its_own_are_left_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"})
    assert read_pairs(path, ("prompt", "completion")) == [{"prompt": "a", "completion": "b"}]


def test_what_is_wrong_is_said_by_line_with_the_forms_that_are_taken(tmp_path: Path) -> None:
    path = written(
        tmp_path / "d.jsonl",
        {"question": "a"},
        "\n",
        {"messages": [ASK]},
        {"messages": [ASK, {"role": "assistant"}]},
        {"instruction": "a", "output": 3},
        {"prompt": " ", "completion": "b"},
        {"messages": "no list"},
        {"messages": [ASK, SAY]},
        {"messages": [{"role": "user", "content": "\ud83c"}, SAY]},
        {"scene": "a", "text": "b", "messages": [ASK, SAY]},
        {"scene": "a", "text": "b", "messages": []},
    )
    with pytest.raises(DataError) as caught:
        read_pairs(path, FIELDS, chats=True)
    lines = [problem.split(":")[0] for problem in caught.value.problems]
    assert lines == ["line 1", "line 1", "line 3", "line 4", "line 5", "line 6", "line 7", "line 9", "line 10"]
    assert caught.value.problems[-1] == 'line 10: both "scene" and "messages" say what is asked; leave one out'
    for form in ('"messages"', '"conversations"', '"instruction"', '"prompt"', '"scene"'):
        assert form in caught.value.next_step


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", "\n", {"messages": [ASK, SAY]}, "\n", "\n", {"scene": "a", "text": "b"})
    assert read_pairs(path, FIELDS).places == ["line 2", "line 5"]
