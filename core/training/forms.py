"""The forms that a line of data may have, read into the fields of a mode: scene (what is asked) and text (the answer).

{"scene": ..., "text": ...}                                  ours
{"messages": [{"role": ..., "content": ...}, ...]}           chats; the last message is the answer
{"conversations": [{"from": "human", "value": ...}, ...]}    the same as ShareGPT writes it
{"instruction" or "prompt": ..., "output", "completion" or "response": ..., "input": may be left out}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = ("scene", "text")
KNOWN = (
    '{"scene", "text"}, {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"instruction" or "prompt", "output" or "completion"}, with "input" behind the instruction where there is one'
)
_ASKED, _ANSWERED = ("instruction", "prompt"), ("output", "completion", "response")
_CHATS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}


def in_our_form(line: dict[str, Any], *, chats: bool) -> dict[str, Any] | list[str]:
    """The same example with "scene" and "text", or what is wrong with it; a line in no known form stays as it is.

    Args:
        line: one JSON object. Its other keys are kept.
        chats: whether "scene" may be a list of messages, for chats of more than one question; else that is wrong.
    """
    if "scene" in line and (chats_too := [key for key in _CHATS if line.get(key)]):
        return [f'both "scene" and "{chats_too[0]}" say what is asked; leave one out']
    if "scene" in line or ("text" in line and not _in_another_form(line)):
        return line
    for key, names in _CHATS.items():
        if key in line:
            return _from_chat(line, key, names, chats=chats)
    asked = next((key for key in _ASKED if key in line), None)
    answered = next((key for key in _ANSWERED if key in line), None)
    if asked is None or answered is None:
        return line
    return _from_pair(line, asked, answered, chats=chats)


def _in_another_form(line: Mapping[str, Any]) -> bool:
    """Whether a line has one without its "text", which many data sets have beside it: the whole as one text."""
    pair = any(key in line for key in _ASKED) and any(key in line for key in _ANSWERED)
    return pair or any(key in line for key in _CHATS)


def _from_pair(line: dict[str, Any], asked: str, answered: str, *, chats: bool) -> dict[str, Any] | list[str]:
    if isinstance(line[asked], list) and isinstance(line[answered], list):  # both are messages, as TRL has it
        whole = {"messages": [*line[asked], *line[answered]]}
        return _from_chat(_without(line, asked, answered) | whole, "messages", _CHATS["messages"], chats=chats)
    problems = [f'"{key}" is not a text' for key in (asked, answered) if not isinstance(line[key], str)]
    further = line.get("input") or ""
    if not isinstance(further, str):
        problems.append('"input" is not a text')
    if problems:
        return problems
    empty = [f'"{key}" is empty' for key in (asked, answered) if not line[key].strip()]
    if empty:
        return empty
    scene = "\n\n".join(part for part in (line[asked], further) if part.strip())
    return {**_without(line, asked, answered, "input"), "scene": scene, "text": line[answered]}


def _from_chat(line: dict[str, Any], key: str, names: tuple[str, str], *, chats: bool) -> dict[str, Any] | list[str]:
    given = line[key]
    messages = [_message(item, *names) for item in given] if isinstance(given, list) else []
    if isinstance(line.get("system"), str) and line["system"].strip():  # ShareGPT's place for it
        messages = [{"role": "system", "content": line["system"]}, *messages]
    before = len(messages) - len(given) if isinstance(given, list) else 0  # a system message has a place of its own
    problems = [
        f'"{key}": message {n} {_why_none(given[n - 1 - before], *names)}'
        for n, m in enumerate(messages, 1)
        if m is None
    ]
    whole = [message for message in messages if message is not None]
    if not problems and (len(whole) < 2 or whole[-1]["role"] != "assistant"):
        problems = [f'"{key}" does not end with a question and the assistant\'s answer to it']
    if not problems and not chats and [m["role"] for m in whole] != ["user", "assistant"]:
        problems = [f'"{key}" has {len(whole)} messages; this mode reads one of the user and its answer']
    if problems:
        return problems
    asked: Any = whole[:-1]
    if [message["role"] for message in asked] == ["user"]:
        asked = asked[0]["content"]
    return {**_without(line, key, "system"), "scene": asked, "text": whole[-1]["content"]}


def _message(item: object, role: str, content: str) -> dict[str, str] | None:
    if not isinstance(item, Mapping) or not isinstance(item.get(role), str):
        return None
    text: Any = item.get(content)
    if isinstance(text, Sequence) and not isinstance(text, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in text]
        text = "".join(str(part) for part in parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(text, str):
        return None
    return {"role": str(_ROLES.get(item[role], item[role])), "content": text}


def _why_none(item: object, role: str, content: str) -> str:
    """What a message has that none of a text model has."""
    if isinstance(item, Mapping) and item.get("tool_calls"):
        return "calls tools, which is not trained on"
    if isinstance(item, Mapping) and isinstance(item.get(role), str) and item.get(content) is not None:
        return f"has a {content} that is not a text"
    return f"has no {role} and {content}"


def _without(line: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in keys}
