"""What plugins' commands get of lora-rt (see `lora_rt.plugins.contract.Services`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from lora_rt.core.cli import console
from lora_rt.core.cli.options import text_format
from lora_rt.core.cli.session import session
from lora_rt.core.requests.composition import Composition
from lora_rt.core.training.data import check_fit, read_pairs
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import AdapterFiles

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from lora_rt.core.runtime import Runtime
    from lora_rt.registry.registry import Registry


class CommandServices:
    """The services of this process. Nothing heavy is imported before a command asks for it."""

    @property
    def out(self) -> Console:
        return console.out

    @property
    def err(self) -> Console:
        return console.err

    def print_json(self, document: Any) -> None:
        console.print_json(document)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        with Progress(console=self.err, transient=True, disable=not self.err.is_terminal) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, advance=1, description=done)

    def read_lines(self, path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
        return read_pairs(path, fields)

    def check_fit(self, lines: Sequence[Mapping[str, Any]], lengths: Sequence[int], runtime: Runtime) -> None:
        check_fit(lines, lengths, runtime.parts.lm.capacity)

    def runtime(
        self,
        *compositions: str,
        base: str,
        precision: str = "int4",
        device: str = "auto",
        allow_base_mismatch: bool = False,
        template_var: Sequence[str] | None = None,
        special_tokens: bool = False,
    ) -> Runtime:
        """A runtime; what can be wrong with names is found out before the base is loaded."""
        from lora_rt.core.cli.look_up import look_up

        text = text_format(template_var, special_tokens)
        session().allow_base_mismatch = session().allow_base_mismatch or allow_base_mismatch
        for composition in [Composition.parse(text) for text in compositions]:
            look_up(composition, base)
        return session().runtime(base, precision, device, **text)

    def registry(self) -> Registry:
        """The registry of the working directory, with the sources of plugins."""
        return session().registry

    def adapter(self, reference: str) -> AdapterFiles:
        found = self.registry().resolve(reference)
        card = found.card.model_dump() if found.card else {}
        return AdapterFiles(found.name, found.folder, card, found.sha256)

    def copy_adapter(self, adapter: AdapterFiles, out: Path, *, mode: str, state: Mapping[str, Tensor]) -> None:
        from lora_rt.core.step.adapter import copy_adapter

        if not adapter.card:
            text = f"the adapter {adapter.name!r} has no register.json, in which its mode could stand"
            raise LoraRtError(text, next_step="Give one that lora-rt trained")
        copy_adapter(adapter.folder, {**adapter.card, "mode": mode}, state, out)
