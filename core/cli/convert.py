"""`lora-rt convert FOLDER`: a plain LoRA in safetensors, of an adapter that is neither."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.export.convert import convert as run


def convert(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="The adapter.")],
    folder: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="A new folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="The dense base that a PiSSA or OLoRA was trained over.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option("--initial", metavar="DIR", help="The adapter as it was saved before training (CorDA, LoRA-GA)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a pickled adapter, or one that changed its base, into a plain LoRA in safetensors."""
    with err.status("converting"):
        made = run(source, folder, base=base, initial=initial)
    if as_json:
        print_json(made.document())
    else:
        out.print(f"wrote [bold]{escape(str(made.folder))}[/]: {escape('; '.join(made.did))}", soft_wrap=True)
