"""What a plugin's commands get of lora-rt, so that they import nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on disk: its folder, its register.json (empty where it has none), the digest over its files."""

    name: str
    folder: Path
    card: Mapping[str, Any]
    sha256: str

    @property
    def mode(self) -> str:
        """Its mode; an adapter without a card is output-only."""
        return str(self.card.get("mode", "output-only"))


class Services(Protocol):
    """Handed to `lora_rt_commands`. Everything raises a LoraRtError with a next step, which passes through as it is.

    `out` is for results and `err` for everything else; options that a command shares with ours (`--base`, `--json`) are
    in `lora_rt.plugins.contract.cli`.
    """

    @property
    def out(self) -> Console:
        """Standard output, for people."""

    @property
    def err(self) -> Console:
        """Standard error: notes and progress."""

    def print_json(self, document: Any) -> None:
        """One JSON document on standard output and nothing else."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar on standard error, where that is a terminal: call what it gives with the name of each finished step."""

    def read_lines(self, path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
        """The objects of a JSONL file, each with these fields as non-empty texts; every bad line is named at once."""

    def check_fit(self, lines: Sequence[Mapping[str, Any]], lengths: Sequence[int], runtime: Any) -> None:
        """Lines that were read, each of so many tokens: those that are longer than the base's context are named."""

    def runtime(
        self,
        *compositions: str,
        base: str,
        precision: str = "int4",
        device: str = "auto",
        allow_base_mismatch: bool = False,
        template_var: Sequence[str] | None = None,
        special_tokens: bool = False,
    ) -> Any:
        """A `lora_rt.Runtime`. Names in the compositions are looked up before seconds are spent on loading.

        The rest is as the options of `lora_rt.plugins.contract.cli` give it.
        """

    def registry(self) -> Any:
        """The `lora_rt.Registry` of the working directory."""

    def adapter(self, reference: str) -> AdapterFiles:
        """The adapter that a reference (a name, a path, a repository) means."""

    def copy_adapter(self, adapter: AdapterFiles, out: Path, *, mode: str, state: Mapping[str, Tensor]) -> None:
        """Write its weights into a new folder as an adapter of another mode, with these tensors as mode.safetensors."""
