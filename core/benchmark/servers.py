"""The servers that are measured, each a process of its own: `lora-rt serve`, and llama.cpp's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil

from lora_rt.core.base.default import gguf_file
from lora_rt.core.benchmark.workloads import BenchmarkError

LLAMA = Path(__file__).with_name("llama_server.py")
_CONTEXT = 512  # tokens of a slot of llama.cpp's

Started = AbstractContextManager[tuple[str, psutil.Process]]
"""The address of a server and its process, which ends with the block."""


def ours(options: Sequence[str]) -> Started:
    """The address of a new `lora-rt serve`, and its process."""
    return _started([sys.executable, "-m", "lora_rt", "serve", "--port", "0", *options])


def llama_cpp(python: str, base: str, names: Sequence[str], rows: int, threads: int, folder: Path) -> Started:
    """The address of llama.cpp's server over the base's GGUF file, with these adapters.

    Args:
        python: of an environment that has xllamacpp.
        folder: where the adapters are exported to.

    Raises:
        BenchmarkError: there is no GGUF file of this base.
    """
    from lora_rt.core.export.run import export

    if (model := gguf_file(base)) is None:
        raise BenchmarkError("there is no GGUF file of this base here", next_step="Leave --llama out, or name one")
    for name in names:
        export(name, "gguf", folder / name, base=base)
    files = [str(folder / name / "adapter.gguf") for name in names]
    return _started([python, str(LLAMA), str(model), str(rows), str(_CONTEXT), str(threads), *files])


@contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """The address that a process prints, and the process, until the block ends."""
    environment = {**os.environ, "COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    text = ""
    try:
        while (found := re.search(r"http://127\.0\.0\.1:\d+", text)) is None:
            line = process.stdout.readline()
            if not line:
                raise BenchmarkError("the server did not start", problems=text.strip().splitlines()[-5:])
            text += line
        with subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL):
            try:
                yield found[0], psutil.Process(process.pid)
            finally:
                process.kill()  # or what it writes would go on being read, and waited for
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
