"""A chat template is a program of a stranger's: one that never ends, or writes gigabytes, is refused before it is used.

Templates that only walk through the messages end by themselves. Those that count, repeat or multiply are tried first in
a process of their own, which can be ended and may take so much memory and no more.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import lru_cache

LONGEST = 1 << 20
"""Letters of a template; the longest known ones have a hundredth of that."""
_SECONDS = 4.0
# What a bounded number of messages can't make large without.
_LABOUR = re.compile(
    r"\brange\b|\*|\bmacro\b|\brecursive\b|\bcenter\b|[lr]just|zfill|\bindent\b|format\b|\d{5,}|~|\blipsum\b"
)
_MANY_LOOPS = 8
_TOO_MUCH = 3
_TRIAL = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
from jinja2 import TemplateError, ext, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(ext.Extension):
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def refuse(message):
    raise TemplateError(message)

extensions = [Generation, ext.loopcontrols]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form, bos_token="<s>", eos_token="</s>")
template = environment.from_string(sys.stdin.read())
user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
for chat in ([user], [user, answer], [user, answer, user]):
    size = 0
    try:
        for piece in template.generate(messages=chat, add_generation_prompt=True, tools=None, documents=None):
            size += len(piece)
            if size > 4_000_000:
                sys.exit(3)
    except MemoryError:
        sys.exit(3)
    except Exception:  # wrong templates are explained where they are rendered
        pass
"""


@lru_cache(maxsize=16)
def trouble_with(source: str) -> str:
    """Why a template can't be used, or nothing. Takes a tenth of a second where it has to be tried."""
    if len(source) > LONGEST:
        return f"it has {len(source)} letters"
    if not _LABOUR.search(source) and source.count("{% for") + source.count("{%- for") <= _MANY_LOOPS:
        return ""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL],
            input=source.encode("utf-8", "replace"),
            timeout=_SECONDS,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        return f"a chat of one word took it more than {_SECONDS:g} seconds"
    return "it makes millions of letters of a chat of one word" if done.returncode == _TOO_MUCH else ""
