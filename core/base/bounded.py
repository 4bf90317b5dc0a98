"""Runs what a base's text may keep busy for ever in a process that can be stopped: see `probe`, which does it apart."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from lora_rt.core.base import identity, probe
from lora_rt.core.base.source import BaseError

_SECONDS = 60  # on the clock, for a whole base; of the processor the probe gives itself few
_TEMPLATE_SECONDS = 8
_LONGEST = 1 << 20  # letters of a template; the longest known ones have a hundredth of that
# Without one of these, or many loops within one another, a template only walks through its few messages.
_LABOUR = re.compile(
    r"\brange\b|\*|\bmacro\b|\brecursive\b|\bcenter\b|[lr]just|zfill|\bindent\b|format\b|\d{5,}|~|\blipsum\b"
)
_MANY_LOOPS = 8

_passed: set[str] = set()  # keys of texts, so that a process tries each once, whatever becomes of the home


def hold_to_limits(folder: Path) -> None:
    """Try a base's templates and tokenizer. What passed once is not tried again.

    Raises:
        BaseError: they do not come to an end, or take memory without limit.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    files = [folder / name for name in names] + sorted((folder / "additional_chat_templates").glob("*.jinja"))
    key = "text:" + hashlib.sha256("".join(identity.sha256_of(f) for f in files if f.is_file()).encode()).hexdigest()
    if _has_passed(key):
        return
    if problem := _said(str(folder), seconds=_SECONDS):
        raise BaseError(f"{folder.name} can't be used: {problem}", next_step="Fetch the model again, or use another")
    for passed in (key, *(_key(template) for _, template in probe.templates(folder))):
        _note(passed)


@lru_cache(maxsize=16)
def trouble_with(template: str) -> str:
    """Why a chat template can't be used, or nothing; for tokenizers that did not come out of a folder of ours.

    Takes a tenth of a second where it has to be tried.
    """
    if len(template) > _LONGEST:
        return f"the chat template has {len(template):,} letters"
    loops = template.count("{% for") + template.count("{%- for")
    if (not _LABOUR.search(template) and loops <= _MANY_LOOPS) or _has_passed(_key(template)):
        return ""
    problem = _said(text=template.encode("utf-8", "replace"), seconds=_TEMPLATE_SECONDS)
    if not problem:
        _note(_key(template))
    return problem


def _has_passed(key: str) -> bool:
    return key in _passed or identity.recall(key) is not None


def _note(key: str) -> None:
    _passed.add(key)
    identity.remember(key, "ends")


def _key(template: str) -> str:
    return "template:" + hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()


def _said(*arguments: str, text: bytes = b"", seconds: float) -> str:
    """What the probe says last."""
    command = [sys.executable, "-I", probe.__file__, *arguments]
    try:
        said = subprocess.run(command, input=text, capture_output=True, timeout=seconds).stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
    return said.decode(errors="replace").removesuffix("\n").rpartition("\n")[2].strip()
