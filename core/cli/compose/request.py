"""What was asked for: checked as far as possible before seconds are spent on loading a base."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_rt.core.requests.composition import Composition
from lora_rt.errors import LoraRtError

if TYPE_CHECKING:
    from lora_rt.core.requests.composition import Term
    from lora_rt.core.runtime import Runtime
    from lora_rt.registry.reference import Reference
    from lora_rt.registry.registry import Registry

# Chosen by reading: greedy text of a small base loops, and without a penalty its samples circle around one phrase.
TOP_P = 0.9
REPETITION_PENALTY = 1.1


class ComposeError(LoraRtError):
    """A compose command that can't be carried out."""


@dataclass(frozen=True, slots=True)
class ComposeRequest:
    """One compose command. `prompt` is None for a chat; `seed` is drawn where none was given."""

    composition: Composition
    prompt: str | None
    base: str
    precision: str
    device: str
    scene: str | None
    max_new_tokens: int
    temperature: float
    seed: int

    @classmethod
    def checked(
        cls, spec: str, prompt: str | None, *, seed: int | None, needs_prompt: bool, after: str | None, **settings: Any
    ) -> ComposeRequest:
        """The request, its names looked up.

        Raises:
            LoraRtError: a bad spec, a name that nothing has, or no prompt where one is needed.
        """
        composition = Composition.parse(spec)
        if after:
            composition = composition.waking(after)
        if prompt is not None and not prompt.strip():
            raise ComposeError(
                "the prompt is empty", next_step='Give one with -p "...", or type lora-rt compose without it to chat'
            )
        if prompt is None and needs_prompt:
            raise ComposeError("there is no prompt", next_step='Give one with -p "..."')
        look_up(composition)
        request = cls(
            composition=composition, prompt=prompt, seed=secrets.randbits(31) if seed is None else seed, **settings
        )
        _check_settings(request)
        return request

    def load(self) -> Runtime:
        """The runtime of this request, with its adapters resident."""
        from lora_rt.core.base.progress import step

        with step("starting"):
            from lora_rt.core.runtime import Runtime
        runtime = Runtime.load(self.base, precision=self.precision, device=self.device)
        runtime.terms(self.composition)
        return runtime

    def sampling(self) -> dict[str, Any]:
        """The sampling settings, as `Runtime.generate` and `Runtime.stream` take them."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": TOP_P,
            "repetition_penalty": REPETITION_PENALTY,
        }


def _check_settings(request: ComposeRequest) -> None:
    from lora_rt.core.base.precision import check_precision
    from lora_rt.core.base.source import parse_base
    from lora_rt.core.generation.sampling import Sampling

    check_precision(request.precision)
    parse_base(request.base)
    Sampling(**request.sampling()).check()


def look_up(composition: Composition) -> None:
    """Names and paths cost nothing to look up; the Hub is asked later, when the base is known."""
    from lora_rt.plugins.manager import load_modes
    from lora_rt.registry.registry import Registry

    registry = Registry(sources=load_modes().sources())
    problems: list[LoraRtError] = []
    for reference in (r for term in composition.terms for r in _references(term, registry)):
        if reference.kind != "hub":
            try:
                registry.resolve(reference)
            except LoraRtError as error:
                problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ComposeError(
            f"{len(problems)} terms can't be used", problems=[f"{e.message}. {e.next_step}" for e in problems]
        )


def _references(term: Term, registry: Registry) -> list[Reference]:
    """The adapters of a term: its own, or those of a named composition."""
    from lora_rt.core.requests.named import named_composition
    from lora_rt.registry.reference import Reference

    mix = named_composition(term, registry.compositions)
    return [term.reference] if mix is None else [Reference.parse(item.reference) for item in mix.terms]
