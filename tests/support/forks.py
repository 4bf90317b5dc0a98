"""Runs of the command line, each in a process of its own that is the fork of one which has imported what it needs.

Python's start and the imports are paid once for all runs. There are two kinds of them: light ones, forks of a process
that has imported the modules of all commands, of which no library is heavy, so what a run finds imported at its end it
has imported itself; and warm ones, forks of a process that has imported torch and its like as well.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "matplotlib")
WARM = ("torch", "transformers", "peft", "lora_rt.core.runtime", "lora_rt.core.training.run")

_PROGRAM = f"""
import importlib, json, os, sys, tempfile, traceback

from lora_rt.core.cli import table
from lora_rt.core.cli.app import run

for name in table.COMMANDS:
    table.load(name)
if sys.argv[1:]:
    import torch
    from lora_rt.core.cli.lean import without_compiling

    without_compiling(torch)
for name in sys.argv[1:]:
    importlib.import_module(name)


def heavy():
    return [name for name in {HEAVY!r} if sys.modules.get(name)]


def answered(asked):
    os.environ.clear()
    os.environ.update(asked["environment"])
    tempfile.tempdir = None
    for number, name in enumerate(("/dev/null", asked["out"], asked["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    if asked["without"]:
        sys.modules[asked["without"]] = None  # for finders and for imports, it is not there
    if asked["largest"]:
        import resource
        sys.dont_write_bytecode = True  # it would be cut off, and found by whoever imports it next
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest"], asked["largest"]))
    sys.argv = ["lora-rt", *asked["arguments"]]
    code = 0
    try:
        run()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = -1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass
    os.write(3, (json.dumps([asked["number"], code, heavy()]) + "\\n").encode())


os.dup2(1, 3)
print(json.dumps(heavy()), flush=True)
for line in sys.stdin:
    asked, children = json.loads(line), []
    for one in asked:
        children.append(os.fork())
        if children[-1] == 0:
            answered(one)
            os._exit(0)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            print("died", status, flush=True)
"""


@dataclass(frozen=True)
class Run:
    """How a run ended: exit code, what it printed and complained of, and the heavy libraries that it had then."""

    code: int
    out: str
    err: str
    heavy: frozenset[str]


class Forks:
    """Runs `lora-rt` in forks of a process that stays."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def __call__(
        self, arguments: Sequence[str], *, without: str = "", out: Path | None = None, largest: int = 0
    ) -> Run:
        """One run, in this process's environment.

        Args:
            arguments: of lora-rt.
            without: a library that is not installed.
            out: a file that is its standard output.
            largest: bytes of the largest file that it may write, as on a full disk; 0 for any.
        """
        asked = {"arguments": [*arguments], "without": without, "largest": largest}
        return self._runs([asked | {"out": str(out)} if out else asked])[0]

    def together(self, arguments: Sequence[str], environments: Sequence[dict[str, str]]) -> list[Run]:
        """Several runs of the same at once, each with these variables more: as a launcher starts them."""
        asked = {"arguments": [*arguments], "without": "", "largest": 0}
        return self._runs([asked | {"environment": os.environ | more} for more in environments])

    @contextmanager
    def interrupting(self, number: int, at: str) -> Iterator[None]:
        """Within the block, one of the runs that go together gets a Ctrl-C when the first one has said `at`."""
        over = threading.Event()

        def watch() -> None:
            said = self._folder / "err0"
            while not over.wait(0.02):
                children = sorted(child.pid for child in psutil.Process(self._process.pid).children())
                if children and said.exists() and at in said.read_text():
                    os.kill(children[number], signal.SIGINT)
                    return

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def _runs(self, asked: list[dict[str, Any]]) -> list[Run]:
        assert self._process.stdin
        assert self._process.stdout
        files = [[self._folder / f"{name}{number}" for name in ("out", "err")] for number in range(len(asked))]
        for file in itertools.chain(*files):
            file.unlink(missing_ok=True)
        whole = [
            {"number": number, "environment": dict(os.environ), "out": str(out), "err": str(err)} | one
            for number, (one, (out, err)) in enumerate(zip(asked, files, strict=True))
        ]
        self._process.stdin.write(json.dumps(whole) + "\n")
        self._process.stdin.flush()
        ended = {}
        for _ in whole:
            number, code, heavy = json.loads(self._process.stdout.readline())
            out, err = (file.read_text() if file.exists() else "" for file in files[number])
            ended[number] = Run(code, out, err, frozenset(heavy))
        return [ended[number] for number in range(len(whole))]


def fresh_environment(folder: Path) -> Path:
    """The Python of a new virtual environment that sees the packages of the running one: nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    # addsitedir, not a plain line: it also reads the .pth files there, which an editable lora-rt is installed by.
    packages = [path for path in sys.path if path.endswith("-packages")]
    lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in packages)
    (Path(site) / "running.pth").write_text(lines)
    return python


@contextmanager
def forks(folder: Path, imported: Sequence[str] = (), python: Path = Path(sys.executable)) -> Iterator[Forks]:
    """Starts that process; what a run prints lies in the folder meanwhile.

    Args:
        folder: an empty one.
        imported: what it imports besides the modules of the commands.
        python: the interpreter.
    """
    command = [python, "-c", _PROGRAM, *imported]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert json.loads(process.stdout.readline()) == [] or imported, "a command's module imports a heavy library"
        yield Forks(process, folder)
        process.stdin.close()
