"""The forms that a line of data may have, read into the fields of a mode: scene (what is asked) and text (the answer).

{"scene": ..., "text": ...}                                  ours
{"messages": [{"role": ..., "content": ...}, ...]}           chats; the last message is the answer
{"conversations": [{"from": "human", "value": ...}, ...]}    the same as ShareGPT writes it
{"instruction", "prompt" or "question": ..., "output", "completion", "response" or "answer": ...}

Beside an instruction there may be an "input" (Alpaca) or a "context" (Dolly), which stand behind it, and before it a
"system" text and a "history" of pairs (LLaMA-Factory). What can't be carried, as tools, is refused and not left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = ("scene", "text")
KNOWN = (
    '{"scene", "text"}, {"messages": [{"role", "content"}, ...]}, {"conversations": [{"from", "value"}, ...]}, '
    '{"instruction", "prompt" or "question", "output", "completion", "response" or "answer"}, '
    'with "input" or "context" behind the instruction where there is one'
)
_ASKED = ("instruction", "prompt", "question")
_ANSWERED = ("output", "completion", "response", "answer")
_FURTHER = ("input", "context")
_CHATS = ("messages", "conversations", "conversation")
_NAMES = ("role", "content"), ("from", "value")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_ROLES |= {role: role for role in ("user", "assistant", "system")}  # however they are capitalized
_NOT_TRAINED_ON = ("tools", "functions")  # beside messages; beside an instruction they are somebody's own


def in_our_form(line: dict[str, Any], *, chats: bool) -> dict[str, Any] | list[str]:
    """The same example with "scene" and "text", or what is wrong with it; a line in no known form stays as it is.

    Args:
        line: one JSON object. Its other keys are kept.
        chats: whether "scene" may be a list of messages, for chats of more than one question; else that is wrong.
    """
    said = [key for key in _CHATS if isinstance(line.get(key), list)]  # else it may be the number of a chat, say
    if "scene" in line and (too := [key for key in said if line[key]]):
        return [f'both "scene" and "{too[0]}" say what is asked; leave one out']
    if "scene" in line or ("text" in line and not _in_another_form(line)):
        return line
    asked = next((key for key in _ASKED if key in line), None)
    answered = next((key for key in _ANSWERED if key in line), None)
    if not said and asked is not None and answered is not None:
        return _from_pair(line, asked, answered, chats=chats)
    chat = next((key for key in (*said, *_CHATS) if key in line), None)
    return line if chat is None else _from_chat(line, chat, line[chat], chats=chats)


def _in_another_form(line: Mapping[str, Any]) -> bool:
    """Whether a line has one without its "text", which many data sets have beside it: the whole as one text."""
    pair = any(key in line for key in _ASKED) and any(key in line for key in _ANSWERED)
    return pair or any(key in line for key in _CHATS)


def _from_pair(line: dict[str, Any], asked: str, answered: str, *, chats: bool) -> dict[str, Any] | list[str]:
    if isinstance(line[asked], list) or isinstance(line[answered], list):  # as TRL has it: one of them may be a text
        given = [("user", line[asked]), ("assistant", line[answered])]
        each = [part if isinstance(part, list) else [{"role": role, "content": part}] for role, part in given]
        return _from_chat(_without(line, asked, answered), asked, each[0] + each[1], chats=chats)
    further = _FURTHER if asked == "instruction" else _FURTHER[:1]
    behind = [key for key in further if line.get(key)]
    problems = [f'"{key}" is not a text' for key in (asked, answered, *behind) if not isinstance(line[key], str)]
    if problems:
        return problems
    empty = [f'"{key}" is empty' for key in (asked, answered) if not line[key].strip()]
    if empty:
        return empty
    scene = "\n\n".join(line[key] for key in (asked, *behind) if line[key].strip())
    rest = _without(line, asked, answered, *further, "system", "history")
    if line.get("system") or line.get("history"):
        history = line.get("history") or []
        if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
            return ['"history" is not a list of pairs of texts']
        turns = [*history, (scene, line[answered])]
        said = [{"role": role, "content": text} for turn in turns for role, text in zip(_TURN, turn, strict=True)]
        return _from_chat(rest | {"system": line.get("system")}, asked, said, chats=chats)
    return {**rest, "scene": scene, "text": line[answered]}


_TURN = ("user", "assistant")


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _from_chat(line: dict[str, Any], key: str, given: Any, *, chats: bool) -> dict[str, Any] | list[str]:
    """The example of a chat whose messages stand at `key`, or what is wrong with it."""
    if left_out := [f'"{name}" can\'t be trained on; leave it out' for name in _NOT_TRAINED_ON if line.get(name)]:
        return left_out
    if not isinstance(given, list):
        return [f'"{key}" is a {type(given).__name__}, not a list of messages']
    messages = [_message(item) for item in given]
    problems = [f'"{key}": message {n} {m}' for n, m in enumerate(messages, 1) if isinstance(m, str)]
    whole = [message for message in messages if not isinstance(message, str)]
    system = line.get("system") or ""  # ShareGPT's place for it
    if not isinstance(system, str):
        problems.append('"system" is not a text')
    elif system.strip():
        whole.insert(0, {"role": "system", "content": system})
    if not problems and (len(whole) < 2 or whole[-1]["role"] != "assistant"):
        problems = [f'"{key}" does not end with a question and the assistant\'s answer to it']
    if not problems and (why := _not_learned(given[-1])):
        problems = [f'"{key}": message {len(given)} {why}']
    if not problems and not chats and [m["role"] for m in whole] != ["user", "assistant"]:
        problems = [f'"{key}" has {len(whole)} messages; this mode reads one of the user and its answer']
    if problems:
        return problems
    asked: Any = whole[:-1]
    if [message["role"] for message in asked] == ["user"]:
        asked = asked[0]["content"]
    return {**_without(line, key, "system", *_NOT_TRAINED_ON), "scene": asked, "text": whole[-1]["content"]}


def _message(item: object) -> dict[str, str] | str:
    """A message's role and text, or what it has that none of a text model has."""
    names = next((names for names in _NAMES if isinstance(item, Mapping) and names[0] in item), _NAMES[0])
    if not isinstance(item, Mapping) or not isinstance(item.get(names[0]), str):
        return f"has no {names[0]} and {names[1]}"
    role, text = item[names[0]], item.get(names[1])
    if isinstance(text, Sequence) and not isinstance(text, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in text]
        text = "".join(str(part) for part in parts) if all(isinstance(part, str) for part in parts) else None
    if isinstance(text, str):
        return {"role": _ROLES.get(str(role).lower(), str(role)), "content": text}
    if item.get("tool_calls"):
        return "calls tools, which is not trained on"
    return f"has no {names[0]} and {names[1]}" if item.get(names[1]) is None else f"has a {names[1]} that is not a text"


def _not_learned(answer: Mapping[str, Any]) -> str:
    """What an answer has that could not be learned as it is meant."""
    if answer.get("weight", 1) != 1:
        return f"has the weight {answer['weight']!r:.40}, and every answer is learned from"
    if answer.get("tool_calls"):
        return "calls tools, which is not trained on"
    return "has reasoning_content, which is not trained on" if answer.get("reasoning_content") else ""


def _without(line: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in keys}
