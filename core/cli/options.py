"""Options that several commands share: each has one name and one explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_rt.plugins.contract.cli import Base, Device, Json, Precision

__all__ = ["Base", "Data", "Device", "Json", "Offline", "Precision", "Scene", "Seed", "Specs"]

Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC", help="Terms name:weight, for instance emotion:0.7 logic:0.3.")
]
Scene = Annotated[
    str | None, typer.Option("--scene", help="The scene type, for modes that gate by it; registered if left out.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Offline = Annotated[bool, typer.Option("--offline", help="Make no request.")]
Data = Annotated[Path, typer.Option("--data", metavar="F.jsonl", help='Lines {"scene": "...", "text": "..."}.')]
