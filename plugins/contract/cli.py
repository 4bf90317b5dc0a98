"""Options that commands share, ours and plugins': each has one name and one explanation.

Not imported by the contract itself, since it needs typer.
"""

from __future__ import annotations

from typing import Annotated

import typer

Base = Annotated[str, typer.Option("--base", help='"default", a folder, a .gguf file, or a hub id\\[@revision].')]
Precision = Annotated[str, typer.Option("--precision", help="float32, bfloat16, float16, int8 or int4.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else.")]
