"""Runs of the command line without torch, each in a process of its own: forks of one that has imported all commands.

What the commands' modules import is paid once. A fork starts with what that process holds, of which no library is
heavy, so what a run finds imported at its end it has imported itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "matplotlib")

_PROGRAM = f"""
import json, os, sys, traceback

from lora_rt.core.cli import table
from lora_rt.core.cli.app import run

for name in table.COMMANDS:
    table.load(name)


def heavy():
    return [name for name in {HEAVY!r} if sys.modules.get(name)]


def answered(asked):
    os.environ.clear()
    os.environ.update(asked["environment"])
    for number, name in enumerate(("/dev/null", asked["out"], asked["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    if asked["without"]:
        sys.modules[asked["without"]] = None  # for finders and for imports, it is not there
    sys.argv = ["lora-rt", *asked["arguments"]]
    code = 0
    try:
        run()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = -1
    sys.stdout.flush()
    sys.stderr.flush()
    with open(asked["result"], "w") as file:
        json.dump([code, heavy()], file)


print(json.dumps(heavy()), flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        answered(json.loads(line))
        os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@dataclass(frozen=True)
class Run:
    """How a run ended: exit code, what it printed and complained of, and the heavy libraries that it imported."""

    code: int
    out: str
    err: str
    heavy: frozenset[str]


class Light:
    """Runs `lora-rt` in forks of a process that stays."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def __call__(self, arguments: Sequence[str], *, without: str = "") -> Run:
        """One run, in this process's environment.

        Args:
            arguments: of lora-rt.
            without: a library that is not installed.
        """
        assert self._process.stdin
        assert self._process.stdout
        out, err, result = (self._folder / name for name in ("out", "err", "result"))
        for file in (out, err, result):
            file.unlink(missing_ok=True)
        asked = {"arguments": [*arguments], "without": without, "environment": dict(os.environ)}
        asked |= {"out": str(out), "err": str(err), "result": str(result)}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ended\n"
        code, heavy = json.loads(result.read_text())
        return Run(code, out.read_text(), err.read_text(), frozenset(heavy))


@contextmanager
def light(folder: Path) -> Iterator[Light]:
    """Starts that process; what a run prints lies in the folder meanwhile."""
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert json.loads(process.stdout.readline()) == [], "a command's module imports a heavy library"
        yield Light(process, folder)
        process.stdin.close()
