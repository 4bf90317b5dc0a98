"""`lora-rt export`: a composition as one adapter for PEFT or llama.cpp, or merged into its base."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from lora_rt.core.base import default
from lora_rt.core.cli import options
from lora_rt.core.cli.console import compose_hint, err, out, print_json
from lora_rt.core.cli.look_up import look_up
from lora_rt.core.cli.session import session, starting
from lora_rt.registry.durable import check_new_folder

if TYPE_CHECKING:
    from lora_rt.core.export.run import Exported

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm/config/lora.py)."""


def export(
    specs: options.Specs,
    folder: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="A new folder.")],
    to: Annotated[
        Literal["peft", "gguf", "merged"],
        typer.Option("--format", help="One PEFT adapter, one GGUF adapter, or the base with it merged in."),
    ] = "peft",
    base: options.Base = "default",
    allow_base_mismatch: options.AllowBaseMismatch = False,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option("--dtype", help="float32 for adapters and bfloat16 for merged if left out."),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Export adapters that gate or wait as if they were always on.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a composition as one adapter for PEFT, vLLM, llama.cpp or Ollama, or as a merged model."""
    composition = options.composition_of(specs)
    check_new_folder(folder)
    look_up(composition, base)
    with starting():
        import torch

        from lora_rt.core.export.run import export as run
    chosen = None if dtype is None else getattr(torch, dtype)
    exported = run(
        composition,
        to,
        folder,
        base=base,
        dtype=chosen,
        static=static,
        registry=session().registry,
        modes=session().modes,
    )
    if as_json:
        print_json(exported.document())
    else:
        _report(exported, base)


def _report(exported: Exported, base: str) -> None:
    for note in exported.notes:
        err.print(f"note: {escape(note)}", soft_wrap=True)
    facts = f"{exported.format}, rank {exported.rank} at {exported.modules} layers, {exported.dtype}"
    out.print(
        f"exported [bold]{escape(exported.title)}[/] to {escape(str(exported.path))}: "
        f"{facts}, {exported.size / 1e6:.1f} MB",
        soft_wrap=True,
    )
    for line in _next_steps(exported, base):
        out.print(escape(line), soft_wrap=True)


def _next_steps(exported: Exported, base: str) -> list[str]:
    where = shlex.quote(str(exported.path) if exported.path.is_absolute() else f"./{exported.path}")
    if exported.format == "gguf":
        gguf = _gguf_of(exported)
        ollama = f"with Ollama, two lines of a Modelfile: FROM {gguf} and ADAPTER {where}/adapter.gguf"
        return [f"load it: {exported.usage(where, gguf)}", ollama]
    load = f"load it: {exported.usage(where)}"
    if exported.format == "merged":
        return [load, f"or convert it for llama.cpp: convert_hf_to_gguf.py {where}"]
    fitting = next((rank for rank in VLLM_RANKS if rank >= exported.rank), None)
    vllm = f"--max-lora-rank {fitting}" if fitting else f"it takes ranks up to {VLLM_RANKS[-1]} only"
    return [load, compose_hint(exported.path, base), f"with vLLM: {vllm}"]


def _gguf_of(exported: Exported) -> str:
    """The base's own GGUF file where there is one."""
    source = exported.base.source
    if source.kind == "gguf":
        return str(source.path)
    fetched = default.downloaded()
    return str(fetched) if source.kind == "default" and fetched.is_file() else "BASE.gguf"
