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
        {"prompt": [ASK], "completion": "It rains."},
        {"prompt": "rain?", "completion": [SAY]},
        {"instruction": "rain?", "context": "", "response": "It rains."},
        {"instruction": "rain?", "input": "", "output": "It rains.", "system": "", "history": []},
        {"question": "rain?", "answer": "It rains."},
        {"conversation": [{"from": "Human", "value": "rain?"}, {"from": "GPT", "value": "It rains."}]},
        {"conversations": [ASK, SAY]},
        {"messages": [ASK, {**SAY, "weight": 1}], "tools": []},
    ],
    ids=[
        "ours",
        "messages",
        "parts",
        "sharegpt",
        "alpaca",
        "alpaca without input",
        "completion",
        "trl",
        "trl, a text answers",
        "trl, a text asks",
        "dolly without context",
        "llama-factory without more",
        "questions",
        "capital letters",
        "other names",
        "openai",
    ],
)
@pytest.mark.parametrize("chats", [True, False])
def test_every_form_gives_the_same_example(tmp_path: Path, line: dict[str, Any], chats: bool) -> None:
    (found,) = read_pairs(written(tmp_path / "d.jsonl", {**line, "scene_type": "body"}), FIELDS, chats=chats)
    assert found == {"scene": "rain?", "text": "It rains.", "scene_type": "body"}


@pytest.mark.parametrize(("further", "answered"), [("input", "output"), ("context", "response")])
def test_an_input_stands_behind_its_instruction(tmp_path: Path, further: str, answered: str) -> None:
    line = {"instruction": "Translate:", further: "rain", answered: "дождь"}
    (found,) = read_pairs(written(tmp_path / "d.jsonl", line), FIELDS)
    assert found == {"scene": "Translate:\n\nrain", "text": "дождь"}


def test_a_system_text_and_a_history_are_said_before_an_instruction(tmp_path: Path) -> None:
    line = {"instruction": "And", "input": "now?", "output": "It rains.", "system": "be kind"}
    path = written(tmp_path / "d.jsonl", line | {"history": [["rain?", "It rains."]]}, line)
    long, short = read_pairs(path, FIELDS, chats=True)
    now = {"role": "user", "content": "And\n\nnow?"}
    assert long == {"scene": [TOLD, ASK, SAY, now], "text": "It rains."}
    assert short == {"scene": [TOLD, now], "text": "It rains."}
    with pytest.raises(DataError, match="2 problems"):
        read_pairs(path, FIELDS)


def test_what_stands_beside_an_instruction_is_left_alone(tmp_path: Path) -> None:
    own = {"tools": ["hammer"], "conversation": "number 5"}
    for line in ({"instruction": "rain?", "output": "It rains."}, {"scene": "rain?", "text": "It rains."}):
        (found,) = read_pairs(written(tmp_path / "d.jsonl", {**line, **own}), FIELDS)
        assert found == {"scene": "rain?", "text": "It rains.", **own}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"messages": [ASK, SAY], "tools": [{"type": "function"}]}, '"tools" can\'t be trained on'),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "message 2 has the weight 0"),
        ({"messages": [ASK, {**SAY, "reasoning_content": "hm"}]}, "message 2 has reasoning_content"),
        ({"messages": [ASK, {**SAY, "tool_calls": [{}]}]}, "message 2 calls tools"),
        ({"messages": json.dumps([ASK, SAY])}, '"messages" is a str, not a list of messages'),
        ({"messages": [ASK, SAY], "system": 5}, '"system" is not a text'),
        ({"instruction": "a", "context": 5, "response": "b"}, '"context" is not a text'),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, '"history" is not a list of pairs'),
    ],
)
def test_what_can_t_be_learned_from_is_refused(tmp_path: Path, line: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(written(tmp_path / "d.jsonl", line), FIELDS, chats=True)
    assert told in caught.value.problems[0]


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
