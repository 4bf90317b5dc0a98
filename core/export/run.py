"""One export, from the text of a composition to a folder that is there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lora_rt.core.base.source import text_of
from lora_rt.core.engine.stack import Factors
from lora_rt.core.export import ExportError, about
from lora_rt.core.export.architectures import architecture_of
from lora_rt.core.export.combine import acting_at, combine, rounded
from lora_rt.core.export.merged import write_merged
from lora_rt.core.export.outline import Outline, outline
from lora_rt.core.export.peft import write_peft_adapter
from lora_rt.core.export.terms import ExportTerm, check_static, find_terms, key_of, read_terms
from lora_rt.core.requests.composition import Composition, CompositionLike
from lora_rt.core.requests.named import raise_all
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry import durable, files
from lora_rt.registry.card import write_card
from lora_rt.registry.errors import RejectedAdapterError
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

    @property
    def title(self) -> str:
        """The composition by the names of its adapters."""
        return about.title(self.terms)

    def usage(self, where: str, gguf: str = "BASE.gguf") -> str:
        """How it is loaded; `where` and `gguf` as for the function of that name."""
        return usage(self.format, where, gguf)

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


class Exporter:
    """Exports over one base: what there is to know of it is read once, and no weight of it is read at all."""

    def __init__(
        self,
        base: str | PathLike[str] = "default",
        *,
        registry: Registry | None = None,
        modes: ModeHost | None = None,
        quick: bool = False,
    ) -> None:
        """
        Args:
            base: "default", a folder, a GGUF file, or a hub id with an optional @revision.
            registry: where names resolve; that of the working directory by default.
            modes: whose hooks are asked whether they act at inference; the installed ones by default.
            quick: leave large weights that were never read before unread, so that names and shapes have to tell
                whether an adapter belongs to this base.

        Raises:
            BaseError: there is no such base, or transformers does not know it.
        """
        self.modes = modes or load_modes()
        self.registry = registry or Registry(sources=self.modes.sources())
        self.base = outline(text_of(base), quick=quick)

    def gather(self, composition: CompositionLike) -> Gathered:
        """Read every adapter of a composition, and find out what of it can't be written down as weights."""
        given = _composition(composition)
        terms, failures = read_terms(given, self.registry, self.base)
        notes, dynamic = check_static(terms, self.modes, self.base)
        return Gathered(self.base, str(given), terms, failures, dynamic, notes)

    def key(self, composition: CompositionLike) -> str:
        """What `Gathered.key` will be, told without a look at the weights.

        Raises:
            LoraRtError: a term can't be found.
        """
        return key_of(self.base, find_terms(_composition(composition), self.registry, self.base))


@dataclass(frozen=True, slots=True)
class Gathered:
    """A composition that was read: its adapters, those that failed, and those that are not static."""

    base: Outline
    text: str
    terms: Sequence[ExportTerm]
    failures: Sequence[LoraRtError]
    dynamic: Sequence[LoraRtError]
    notes: Sequence[str]

    @property
    def key(self) -> str:
        """One digest over the base, the adapters' files and their weights, however the composition was spelled."""
        return key_of(self.base, [(term.resolved.sha256, term.condition, term.weights) for term in self.terms])

    @property
    def rank(self) -> int:
        """The largest rank of a layer; 0 where every weight is 0."""
        return max((sum(f.a.shape[0] for f, _ in found) for found in self._acting()), default=0)

    @property
    def has_biases(self) -> bool:
        """Whether a bias is added anywhere, which only PEFT and merged models can hold."""
        return any(factors.bias is not None for found in self._acting() for factors, _ in found)

    def _acting(self) -> Iterator[list[tuple[Factors, float]]]:
        return (acting_at(module, self.terms) for module in self.base.linears)

    def write(self, to: Format, out: str | Path, *, dtype: torch.dtype | None = None, static: bool = False) -> Exported:
        """Write it into a new folder, whole or not at all; the arguments are those of `export`.

        Raises:
            LoraRtError: a term can't be used or has no static equivalent, or the format can't hold the composition.
        """
        _check_format(to, dtype)
        wrong = [*self.failures, *(() if static else self.dynamic)]
        raise_all(wrong, f"{len(wrong)} terms of {self.text} can't be exported", ExportError)
        out, left_out = Path(out), static and bool(self.dynamic)
        factors = combine(self.terms, self.base)
        chosen = dtype or (torch.bfloat16 if to == "merged" else torch.float32)
        with durable.new_folder(out) as folder:
            with durable.storage_errors("the export"):
                _write(to, folder, factors, self.terms, self.base, chosen, left_out)
            text = about.readme(self.terms, self.base, usage(to, "THIS_FOLDER"), left_out=left_out)
            (folder / files.README).write_text(text, encoding="utf-8")
            digests, size = _digests(folder)
        return Exported(
            format=to,
            path=out,
            base=self.base,
            terms=self.terms,
            dtype=str(chosen).removeprefix("torch."),
            rank=self.rank,
            modules=len(factors),
            static=left_out,
            notes=self.notes,
            sha256=files.combined(digests),
            size=size,
        )


def export(
    composition: CompositionLike,
    to: Format,
    out: str | Path,
    *,
    base: str | PathLike[str] = "default",
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
    given = _composition(composition)
    _check_format(to, dtype)
    durable.check_new_folder(Path(out))
    exporter = Exporter(base, registry=registry, modes=modes)
    if to == "gguf":
        architecture_of(exporter.base.config)
    return exporter.gather(given).write(to, out, dtype=dtype, static=static)


def _composition(given: CompositionLike) -> Composition:
    found = Composition.of(given)
    if found is None:
        raise UsageError("there is no composition", next_step="Give one, for instance: emotion:0.7 logic:0.3")
    return found


def _check_format(to: str, dtype: torch.dtype | None) -> None:
    """
    Raises:
        UsageError: there is no such format, or the dtype is not one of torch's.
    """
    if to not in get_args(Format):
        raise UsageError(f"there is no format {to!r}", next_step=f"Use one of: {', '.join(get_args(Format))}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise UsageError(f"{dtype!r} is not a dtype", next_step="Give one of torch's, for instance torch.float16")


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
        from lora_rt.core.export.gguf import write_gguf_adapter  # llama.cpp's package takes a second to import

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
        _check_written(folder, base)


def _check_written(folder: Path, base: Outline) -> None:
    """The composition that is written has to pass what every adapter has to pass that is loaded.

    Raises:
        ExportError: it does not, though each of its adapters did.
    """
    try:
        inspect_adapter(folder, name="export", linears=base.linears, base=base.identity)
    except RejectedAdapterError as error:
        text = "as one adapter this composition is beyond what an adapter may hold"
        next_step = "Give smaller weights, or fewer adapters"
        raise ExportError(text, next_step=next_step, problems=error.problems) from error


def _digests(folder: Path) -> tuple[dict[str, str], int]:
    """The sha256 of every file but README.md, and the bytes of all files."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in found}
    digests = {p.name: files.sha256_of(p, sizes[p.name]) for p in found if p.name != files.README}
    return digests, sum(sizes.values())
