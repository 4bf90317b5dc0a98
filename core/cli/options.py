"""Options that several commands share: each has one name and one explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Option("--base", help='"default", a folder, a .gguf file, or a hub id\\[@revision].')]
Precision = Annotated[str, typer.Option("--precision", help="float32, bfloat16, float16, int8 or int4.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, and nothing else.")]
Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC", help="Terms name:weight, for instance emotion:0.7 logic:0.3.")
]
Scene = Annotated[
    str | None, typer.Option("--scene", help="The scene type, for modes that gate by it; registered if left out.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Offline = Annotated[bool, typer.Option("--offline", help="Make no request.")]
Data = Annotated[Path, typer.Option("--data", metavar="F.jsonl", help='Lines {"scene": "...", "text": "..."}.')]
