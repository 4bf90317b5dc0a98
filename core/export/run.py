"""One export, from the text of a composition to a folder that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lora_rt.core.engine.stack import Factors
from lora_rt.core.export import about
from lora_rt.core.export.architectures import architecture_of
from lora_rt.core.export.combine import combine, rounded
from lora_rt.core.export.gguf import write_gguf_adapter
from lora_rt.core.export.merged import write_merged
from lora_rt.core.export.outline import Outline, outline
from lora_rt.core.export.peft import write_peft_adapter
from lora_rt.core.export.static import check_static
from lora_rt.core.export.terms import ExportTerm, raise_all, read_terms
from lora_rt.core.requests.composition import Composition
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry import durable, files
from lora_rt.registry.card import write_card
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.registry import Registry

Format = Literal["peft", "gguf", "merged"]
GGUF_NAME = "adapter.gguf"


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. `rank` is the largest of a layer; `sha256` one digest over the files but README.md."""

    format: Format
    path: Path
    base: Outline
    terms: Sequence[ExportTerm]
    dtype: str
    rank: int
    modules: int
    static: bool
    notes: Sequence[str]
    sha256: str
    size: int

    def document(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "format": self.format,
            "path": str(self.path),
            "base": self.base.identity.id,
            "dtype": self.dtype,
            "rank": self.rank,
            "modules": self.modules,
            "static": self.static,
            "terms": [term.document() for term in self.terms],
            "notes": list(self.notes),
            "sha256": self.sha256,
            "bytes": self.size,
        }


def export(
    composition: Composition | str,
    to: Format,
    out: str | Path,
    *,
    base: str = "default",
    dtype: torch.dtype | None = None,
    static: bool = False,
    registry: Registry | None = None,
    modes: ModeHost | None = None,
) -> Exported:
    """Write a composition as something that others load.

    Args:
        composition: what `lora-rt compose` takes; named compositions keep their weights per layer.
        to: "peft" for one adapter, "gguf" for one adapter in llama.cpp's format, "merged" for a dense model.
        out: a folder that is not there yet, or is empty.
        base: "default", a folder, a GGUF file, or a hub id with an optional @revision.
        dtype: of what is saved; float32 for adapters and bfloat16 for a merged model if left out.
        static: export gated and waiting adapters as if they were always on, instead of refusing them.
        registry: where names resolve; that of the working directory by default.
        modes: whose hooks are asked whether they act at inference; the installed ones by default.

    Raises:
        LoraRtError: a term can't be used or has no static equivalent, or the format can't hold the composition.
    """
    given = Composition.parse(composition) if isinstance(composition, str) else composition
    host = modes or load_modes()
    out = Path(out)
    durable.check_new_folder(out)
    with durable.new_folder(out) as folder:
        shape = outline(base)
        if to == "gguf":
            architecture_of(shape.config)
        terms, failures = read_terms(given, registry or Registry(sources=host.sources()), shape)
        notes, dynamic = check_static(terms, host, shape)
        left_out = static and bool(dynamic)
        if static:
            dynamic = []
        raise_all([*failures, *dynamic], f"{len(failures) + len(dynamic)} terms of {given} can't be exported")
        factors = combine(terms, shape)
        chosen = dtype or (torch.bfloat16 if to == "merged" else torch.float32)
        with durable.storage_errors("the export"):
            _write(to, folder, factors, terms, shape, chosen, left_out)
        text = about.readme(terms, shape, usage(to, "THIS_FOLDER"), left_out=left_out)
        (folder / files.README).write_text(text, encoding="utf-8")
        digests, size = _digests(folder)
    return Exported(
        format=to,
        path=out,
        base=shape,
        terms=terms,
        dtype=str(chosen).removeprefix("torch."),
        rank=max(item.a.shape[0] for item in factors.values()),
        modules=len(factors),
        static=left_out,
        notes=notes,
        sha256=files.combined(digests),
        size=size,
    )


def usage(to: Format, where: str, gguf: str = "BASE.gguf") -> str:
    """How the export in the folder `where` is loaded; `gguf` is the base's GGUF file."""
    if to == "gguf":
        return f"llama-cli -m {gguf} --lora {where}/{GGUF_NAME}"
    if to == "peft":
        return f'PeftModel.from_pretrained(base, "{where}")'
    return f'AutoModelForCausalLM.from_pretrained("{where}")'


def _write(
    to: Format,
    folder: Path,
    factors: Mapping[str, Factors],
    terms: Sequence[ExportTerm],
    base: Outline,
    dtype: torch.dtype,
    left_out: bool,
) -> None:
    if to == "merged":
        write_merged(folder, factors, base, dtype)
    elif to == "gguf":
        write_gguf_adapter(
            folder / GGUF_NAME,
            rounded(factors, dtype),
            base.config,
            dtype=dtype,
            name=about.title(terms),
            base=base.identity.id,
            licence=about.licence(terms),
        )
    else:
        write_peft_adapter(folder, rounded(factors, dtype), base)
        write_card(folder, about.card(terms, base, left_out=left_out))
        # The composition that is written has to pass what every adapter has to pass that is loaded.
        inspect_adapter(folder, name="export", linears=base.linears, base=base.identity)


def _digests(folder: Path) -> tuple[dict[str, str], int]:
    """The sha256 of every file but README.md, and the bytes of all files."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in found}
    digests = {p.name: files.sha256_of(p, sizes[p.name]) for p in found if p.name != files.README}
    return digests, sum(sizes.values())
