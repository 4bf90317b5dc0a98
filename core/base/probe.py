"""Run in a process of its own, under limits: whether a base's chat template and tokenizer come to an end.

A template is a program, and the pattern that cuts text into words may take time exponential in its length: neither can
be told by reading, and a thread that hangs in one can't be stopped. This file is given to Python as it is and imports
nothing of lora_rt. Its argument is the base's folder, or nothing where a template comes on standard input; its last
line of output is what is wrong, or nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 64 << 20  # of a file
MAX_RENDERED = 1 << 20  # characters, for a chat of a word or two
_USER, _ANSWER = {"role": "user", "content": "word"}, {"role": "assistant", "content": "answer"}
CHATS = ([_USER], [_USER, _ANSWER], [_USER, _ANSWER, _USER])
TEXTS = (
    "a" * 60 + "!", "hello world " * 40 + "!", "1" * 60 + "x", " " * 200 + "x", "\n" * 200 + "x", "\u00e9" * 60,
)  # fmt: skip


def main(folder: Path | None) -> None:
    """Print what would be wrong before it is tried: whoever is stopped has said why."""
    limit_memory()
    given = [("", sys.stdin.buffer.read().decode(errors="replace"))] if folder is None else templates(folder)
    for name, template in given:
        what = f"the chat template {name}".strip()
        print(f"{what} does not come to an end", flush=True)
        limit_seconds(1)
        if rendered(template) > MAX_RENDERED:
            print(f"{what} makes more than {MAX_RENDERED:,} characters of one word")
            return
    problem = ""
    if folder is not None and (tokenizer := folder / "tokenizer.json").is_file():
        print("the tokenizer does not come to an end", flush=True)
        problem = encoded(tokenizer)
    print(problem)


def limit_memory() -> None:
    """A GiB and a half in all, where the system has such a limit."""
    _limit("RLIMIT_CORE", 0, 0)
    _limit("RLIMIT_AS", 3 << 29, 3 << 29)


def limit_seconds(seconds: int) -> None:
    """Of the processor, from now on: a busy machine does not make a good base a bad one."""
    _limit("RLIMIT_CPU", int(time.process_time()) + 1 + seconds, None)


def _limit(what: str, soft: int, hard: int | None) -> None:
    """`hard` is None for none."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(getattr(resource, what), (soft, resource.RLIM_INFINITY if hard is None else hard))


def templates(folder: Path) -> list[tuple[str, str]]:
    """(name, text) of each template of the folder."""
    found = []
    for file in [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
        if file.is_file() and file.stat().st_size < MAX_BYTES:
            found.append((file.stem, file.read_text(errors="replace")))
    for name in ("chat_template.json", "tokenizer_config.json"):
        try:
            document = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        template = document.get("chat_template") if isinstance(document, dict) else None
        if isinstance(template, str):
            found.append(("", template))
        elif isinstance(template, list):
            named = [(str(t.get("name")), t.get("template")) for t in template if isinstance(t, dict)]
            found += [(name, text) for name, text in named if isinstance(text, str)]
    return found


def template_environment() -> Any:
    """Jinja's environment of chat templates, as transformers has it."""
    from jinja2 import exceptions, ext, nodes, sandbox, utils

    class Generation(ext.Extension):
        """`{% generation %}` of transformers: a block that is its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """The block's content in a scope."""
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def not_inner(name: object) -> None:
        if str(name).startswith("_"):
            raise exceptions.SecurityError(f"a chat template can't keep {name!r} in a namespace")

    class OwnNamespace(utils.Namespace):
        """Holds no names that begin like Python's inner ones; every other name is a template's."""

        def __init__(*given: Any, **named: Any) -> None:
            for name in dict(*given[1:], **named):
                not_inner(name)
            utils.Namespace.__init__(*given, **named)

        def __setitem__(self, name: str, value: Any) -> None:
            not_inner(name)
            utils.Namespace.__setitem__(self, name, value)

    def refuse(message: str) -> NoReturn:
        raise exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    extensions = [Generation, ext.loopcontrols]
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = OwnNamespace
    environment.globals["dict"] = lambda *given, **named: dict(*given, **named)
    environment.filters["tojson"] = tojson
    return environment


def rendered(text: str) -> int:
    """How long the longest of the chats becomes; 0 where the template can't be run like this, which others explain."""
    environment = template_environment()
    environment.globals.update(bos_token="<s>", eos_token="</s>", tools=None, documents=None)
    longest = 0
    for chat in CHATS:
        total = 0
        try:
            for piece in environment.from_string(text).generate(messages=chat, add_generation_prompt=True):
                total += len(piece)
                if total > MAX_RENDERED:
                    return total
        except MemoryError:
            return sys.maxsize
        except Exception:  # a template may raise whatever it likes
            continue
        longest = max(longest, total)
    return longest


def encoded(file: Path) -> str:
    """What is wrong with the patterns of a tokenizer; one that can't be read at all is explained elsewhere."""
    from tokenizers import Tokenizer

    limit_seconds(30)  # the vocabulary of a large model takes seconds
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises no other kind
        return ""
    limit_seconds(3)
    try:
        for text in TEXTS:
            tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:  # a panic of the library is no Exception
        lines = str(error).splitlines() or [type(error).__name__]
        return f"the tokenizer fails on ordinary text: {lines[0][:120]}"
    return ""


if __name__ == "__main__":
    os.environ["RUST_BACKTRACE"] = "0"
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
