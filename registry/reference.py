"""References: how a user points at an adapter.

name            emotion
name@revision   emotion@3f2a91c
org/repo        someone/emotion-lora
org/repo@rev    someone/emotion-lora@v1
org/repo//sub   someone/registers//emotion@v1      an adapter in a folder of the repository
a path          ./mine  ../mine  /data/mine  ~/mine
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from lora_rt.registry.errors import InvalidReferenceError
from lora_rt.registry.strict_json import shown

_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(_WORD)
BASE = "base"
"""What is called the base alone, by a server and in tables: nothing else may be."""
_HUB = re.compile(rf"{_WORD}/{_WORD}")
_FOLDER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,5}")
_MAX_NAME_BYTES = 200
_MAX_TARGET = 220  # it becomes the name of a folder
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FORMS = (
    "Write a name, name@revision, org/repo, org/repo@revision, org/repo//folder@revision, "
    "or a path that starts with ./ ../ / or ~"
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference. `target` is the name, repository or path without the revision; `text` is what was typed.

    The target of an adapter in a folder of a repository is `org/repo//folder`, see `hub_place`.
    """

    kind: Literal["name", "hub", "path"]
    target: str
    revision: str | None
    text: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Parse what a user typed.

        Raises:
            InvalidReferenceError: naming what is wrong with it.
        """
        if is_path(text):
            if "\0" in text:
                raise InvalidReferenceError(f"{text!r} holds a null character, which no path can", next_step=_FORMS)
            return cls("path", text, None, text)
        text = composed(text)
        target, at, revision = text.partition("@")
        problem = _problem(target, revision, bool(at))
        if problem:
            raise InvalidReferenceError(f"{text[:120]!r} is not a reference: {problem}", next_step=_FORMS)
        return cls("hub" if "/" in target else "name", target, revision or None, text)

    @classmethod
    def of(cls, value: Reference | str | os.PathLike[str]) -> Reference:
        """The reference that a caller gave in any form; a path is one, however it is written.

        Raises:
            InvalidReferenceError: as `parse`.
        """
        if isinstance(value, Reference):
            return value
        try:
            text = value if isinstance(value, str) else os.fsdecode(value)
        except TypeError as error:
            text = f"{value!r:.120} is not a reference: it is a {type(value).__name__}"
            raise InvalidReferenceError(text, next_step=_FORMS) from error
        return cls.parse(text if isinstance(value, str) or is_path(text) else f"./{text}")


def composed(text: str) -> str:
    """The form (NFC) in which names are kept: some keyboards and file systems give a letter and its mark apart.

    What a program gives that is no text stays what it is, for those who check names.
    """
    return unicodedata.normalize("NFC", text) if isinstance(text, str) else text


def is_path(text: str) -> bool:
    """Whether the text is meant as a path on this machine."""
    return text.startswith(("./", "../", "/", "~")) or text in (".", "..")


def is_name(text: str) -> bool:
    """Whether an adapter may be called this: letters, digits, `.`, `_`, `-`, at most 96, no separator at an end.

    Letters of any script, in the composed form (NFC) and with their marks: signs that only look like a letter, or turn
    the line round, are none. A name becomes that of a file, which has 255 bytes.
    """
    if _NAME.fullmatch(text) is not None:
        return ".." not in text
    if not 1 <= len(text) <= 96 or len(text.encode(errors="replace")) > _MAX_NAME_BYTES or ".." in text:
        return False
    letters = [unicodedata.category(letter)[0] in "LM" or letter in "0123456789" for letter in text]
    ends = letters[0] and unicodedata.category(text[0])[0] != "M" and (letters[-1] or text[-1] == "_")
    inside = all(fine or letter in "._-" for fine, letter in zip(letters, text, strict=True))
    return ends and inside and unicodedata.is_normalized("NFKC", text)


def name_problem(name: str, thing: str = "an adapter") -> list[str]:
    """A line where nothing of ours may be called this, none where it may."""
    if isinstance(name, str) and is_name(name):
        return []
    return [f"{shown(str(name))} is not a name that {thing} can have: letters, digits, '.', '_' and '-', at most 96"]


def new_name_problem(name: str, thing: str = "an adapter") -> list[str]:
    """The same for what is new, which may not be called what means the base alone."""
    return [f"{name!r} means the base alone"] if name == BASE else name_problem(name, thing)


def check_name(name: str, thing: str = "an adapter") -> None:
    """Raises InvalidReferenceError where nothing new of ours may be called this."""
    for problem in new_name_problem(name, thing):
        raise InvalidReferenceError(problem, next_step=f"Choose another name for {thing}")


def is_hub_id(text: str) -> bool:
    """Whether the text has the form `org/repo`."""
    return _HUB.fullmatch(text) is not None and ".." not in text and "--" not in text


def hub_place(target: str) -> tuple[str, str]:
    """(org/repo, folder in it or "") of the target of a reference to the Hub."""
    repo, _, folder = target.partition("//")
    return repo, folder


def is_hub_target(text: str) -> bool:
    """Whether the text has the form `org/repo` or `org/repo//folder`."""
    repo, folder = hub_place(text)
    if "//" not in text:
        return is_hub_id(repo)
    is_folder = _FOLDER.fullmatch(folder) is not None and ".." not in folder
    return is_hub_id(repo) and is_folder and len(text) <= _MAX_TARGET


def is_commit(text: str) -> bool:
    """Whether the text is a full commit: 40 lower-case hexadecimal digits."""
    return _COMMIT.fullmatch(text) is not None


def _problem(target: str, revision: str, has_revision: bool) -> str:
    if not target:
        return "it is empty" if not has_revision else "there is nothing before the @"
    if "\\" in target:
        return "a backslash is not a separator here"
    if "//" in revision:
        return "the revision comes at the end: org/repo//folder@revision"
    it = repr(target[:80]) if has_revision else "it"
    if "/" in target and not is_hub_target(target):
        folder = f"; a folder is written as a path: ./{target[:80]}" if target.endswith("/") else ""
        return f"{it} is not of the form org/repo or org/repo//folder{folder}"
    if "/" not in target and not is_name(target):
        return f"{it} is not a name (letters, digits, '.', '_', '-')"
    if has_revision and not (_REVISION.fullmatch(revision) and ".." not in revision):
        return f"{revision[:80]!r} is not a revision (a commit, tag or branch)" if revision else "nothing follows the @"
    return ""
