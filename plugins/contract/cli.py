"""Options that commands share, ours and plugins': each has one name, one explanation and one check.

Not imported by the contract itself, since it needs typer.
"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from lora_rt.errors import UsageError

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")


def _precision(value: str) -> str:
    if value not in PRECISIONS:
        raise UsageError(f"there is no precision {value!r}", next_step=f"Use one of: {', '.join(PRECISIONS)}")
    return value


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise UsageError(f"there is no device {value!r}", next_step="Use auto, cpu, cuda or cuda:N")
    return value


Base = Annotated[str, typer.Option("--base", help='"default", a folder, a .gguf file, or a hub id\\[@revision].')]
Precision = Annotated[
    str, typer.Option("--precision", callback=_precision, help="float32, bfloat16, float16, int8 or int4.")
]
Device = Annotated[str, typer.Option("--device", callback=_device, help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]
