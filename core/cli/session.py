"""What one run of the command line opens once and all of its parts share: modes, registry, and a runtime over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_rt.core.base.choices import check_device, check_precision, check_wish
from lora_rt.core.base.configuration import check_base
from lora_rt.core.base.progress import step
from lora_rt.core.cli.lean import import_lean
from lora_rt.plugins.manager import load_modes

if TYPE_CHECKING:
    from lora_rt.core.llama_cpp.runtime import LlamaRuntime
    from lora_rt.core.runtime import Runtime
    from lora_rt.plugins.manager import ModeHost
    from lora_rt.registry.registry import Registry

_session: ContextVar[Session | None] = ContextVar("session", default=None)


class Session:
    """Modes and registry are opened when they are first asked for.

    `allow_base_mismatch` and `multiply` are what the command's options of that name say.
    """

    allow_base_mismatch = False
    multiply: str | None = None

    @cached_property
    def modes(self) -> ModeHost:
        """The installed modes."""
        return load_modes()

    @cached_property
    def told(self) -> set[str]:
        """Of which kinds of mixes a warning was given."""
        return set()

    @cached_property
    def registry(self) -> Registry:
        """The registry of the home and the working directory, with the sources of plugins."""
        from lora_rt.registry.registry import Registry

        return Registry(sources=self.modes.sources(), allow_base_mismatch=self.allow_base_mismatch)

    def check(self, base: str, precision: str, device: str) -> None:
        """Raises LoraRtError for what can be wrong with these, as far as that is known without torch: sooner."""
        check_precision(precision)
        check_base(base, precision)
        check_device(device)
        check_wish(self.multiply)

    def runtime(self, base: str, precision: str, device: str, **text: Any) -> Runtime:
        """A base in memory, with these modes and this registry; `text` is how it reads prompts, as for `Runtime.load`.

        Raises:
            LoraRtError: with what went wrong and what to do.
        """
        self.check(base, precision, device)
        with starting():
            import_lean()
            from lora_rt.core.runtime import Runtime
        text |= {"modes": self.modes, "registry": self.registry, "multiply": self.multiply}
        made = Runtime.load(base, precision=precision, device=device, **text)
        made.parts.weigher.told |= {"doubled", "sum", "negative"}  # commands warn before they load a base
        return made

    def llama_cpp(self, base: str, precision: str, device: str, **text: Any) -> LlamaRuntime:
        """A base for llama.cpp, with these modes and this registry; `text` as for `runtime`.

        Raises:
            LoraRtError: with what went wrong and what to do.
        """
        from lora_rt.core.llama_cpp.runtime import LlamaRuntime

        check_precision(precision)
        check_device(device)
        text |= {"precision": precision, "device": device}
        return LlamaRuntime.load(base, registry=self.registry, modes=self.modes, **text)


def session() -> Session:
    """The session of this run; outside of a run, a new one."""
    return _session.get() or Session()


def starting() -> AbstractContextManager[None]:
    """Something to see while torch and what stands on it are imported."""
    return step("starting")


@contextmanager
def new_session() -> Iterator[Session]:
    """One run: everything inside shares what is opened."""
    made = Session()
    token = _session.set(made)
    try:
        yield made
    finally:
        _session.reset(token)
