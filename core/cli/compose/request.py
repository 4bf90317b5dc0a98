"""What was asked for: checked as far as possible before seconds are spent on loading a base."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from lora_rt.core.base.identity import identify_base
from lora_rt.core.base.progress import step
from lora_rt.core.cli.console import err, warn
from lora_rt.core.cli.options import usage
from lora_rt.core.cli.session import session
from lora_rt.core.generation.messages import check_text
from lora_rt.core.generation.prompts import template_variables
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.llama_cpp.server import check_installed
from lora_rt.core.requests.activation import scene_turns
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.measured import outside
from lora_rt.core.requests.named import named_composition, raise_all
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.registry.inspection import foreseen
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved

if TYPE_CHECKING:
    from lora_rt.core.generation.messages import Prompt
    from lora_rt.core.llama_cpp.runtime import LlamaRuntime
    from lora_rt.core.runtime import Runtime

# Where answers are sampled and nothing else is said. Chosen by reading: without a penalty the samples of a small base
# circle around one phrase. Greedy is greedy: the likeliest token.
TOP_P = 0.9
REPETITION_PENALTY = 1.1


TORCH, LLAMA_CPP = "torch", "llama.cpp"
_NEUTRAL = "neutral"  # a scene that belongs to no type


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
    normalize: float | None = None
    after: str | None = None
    top_p: float | None = None
    top_k: int = 0
    repetition_penalty: float | None = None
    system: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: bool = False
    engine: str = TORCH

    @classmethod
    def checked(
        cls,
        composition: Composition,
        prompt: str | None,
        *,
        seed: int | None,
        needs_prompt: bool,
        after: str | None,
        template_var: Sequence[str] = (),
        **settings: Any,
    ) -> ComposeRequest:
        """The request, its names looked up.

        Raises:
            UsageError: no prompt where one is needed, or a setting out of range.
            LoraRtError: a name that nothing has, or a base that is not there.
        """
        with usage():
            for what, text in (("the prompt", prompt), ("--system", settings.get("system")), ("--after", after)):
                check_text(text or "", what)
            variables = template_variables(template_var)
        if prompt is not None and not prompt.strip():
            raise UsageError(
                "the prompt is empty", next_step='Give one with -p "...", or type lora-rt compose without it to chat'
            )
        if prompt is None and needs_prompt:
            raise UsageError("there is no prompt", next_step='Give one with -p "..."')
        request = cls(
            composition=composition,
            prompt=prompt,
            seed=secrets.randbits(31) if seed is None else seed,
            after=after,
            template_variables=variables,
            **settings,
        )
        with usage():
            Sampling(**request.sampling()).check()
        return request.under(composition)

    def under(self, composition: Composition) -> ComposeRequest:
        """The same request with these terms: normalized, asleep until `after`, looked up, their weights cautioned of.

        Raises:
            LoraRtError: they can't be used.
        """
        composition = normalized(composition, self.normalize)
        if self.after:
            composition = composition.waking(self.after)
        check_scene(self.scene, composition, look_up(composition, self.base))
        caution(composition, self.base)
        return replace(self, composition=composition)

    def load(self) -> Runtime | LlamaRuntime:
        """The runtime of this request, with its adapters resident."""
        text = {"template_variables": self.template_variables, "special_tokens": self.special_tokens}
        runtime: Runtime | LlamaRuntime
        if self.engine == TORCH:
            runtime = session().runtime(self.base, self.precision, self.device, **text)
        else:
            runtime = session().llama_cpp(self.base, self.precision, self.device, **text)
        runtime.terms(self.composition)
        return runtime

    def sampling(self) -> dict[str, Any]:
        """The sampling settings, as `Runtime.generate` and `Runtime.stream` take them."""
        sampled = self.temperature > 0
        usual = REPETITION_PENALTY if sampled else 1.0
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": (TOP_P if sampled else 1.0) if self.top_p is None else self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": usual if self.repetition_penalty is None else self.repetition_penalty,
        }

    def asked(self, prompt: Prompt) -> Prompt:
        """The prompt with the system message, where there is one, before it."""
        if self.system is None:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return [{"role": "system", "content": self.system}, *messages]


def check_engine(engine: str, *, base: str, precision: str, **only_torch: object) -> None:
    """Whether an engine is one, and takes the options that were given.

    Args:
        base, precision: a GGUF file has a precision of its own.
        only_torch: what only our own engine reads, by the options' names; None where they were left out.

    Raises:
        UsageError: it is none, or does not.
        LoraRtError: it is not installed.
    """
    if engine == TORCH:
        return
    if engine != LLAMA_CPP:
        raise UsageError(f"there is no engine {engine!r}", next_step=f"Use --engine {TORCH} or --engine {LLAMA_CPP}")
    given = [f"--{name}" for name, value in only_torch.items() if value]
    given += ["--precision"] if precision != "int4" and (base == "default" or base.endswith(".gguf")) else []
    if given:
        text = f"llama.cpp has no use for {' and '.join(given)}"
        raise UsageError(text, next_step=f"Leave {'it' if len(given) == 1 else 'them'} out, or use --engine {TORCH}")

    check_installed()


def look_up(composition: Composition, base: str | None = None) -> list[Resolved]:
    """Whatever can be known of a composition's adapters before a base is fetched, converted or loaded.

    Names, cards, configurations, modes, and whether they are for the base that `--base` means. No weights of what is
    here are read; what only the Hub has is fetched first, since an adapter is small and a base is not.

    Returns:
        The adapters.

    Raises:
        LoraRtError: terms that can't be used; all of them are named.
    """
    opened = session()
    identity = None if base is None else identify_base(base)
    stated = None if opened.registry.allow_base_mismatch else identity
    adapters: list[Resolved] = []
    problems: list[LoraRtError] = []
    for reference in dict.fromkeys(r for term in composition.terms for r, _ in _references(term, opened.registry)):
        try:
            with step(f"looking up {reference.text}"):
                found = opened.registry.find(reference, identity)
            opened.modes.require(foreseen(found.folder, name=found.name, base=stated))
            adapters.append(found)
        except LoraRtError as error:
            problems.append(error)
    raise_all(problems, f"{len(problems)} terms can't be used")
    return adapters


def check_scene(scene: str | None, composition: Composition, adapters: Sequence[Resolved]) -> None:
    """What `--scene` or `/scene` says, against the scene types of whatever in use tells scenes apart.

    Where none does, that is said in a line: a mode may read scenes without telling them apart, but few do.

    Raises:
        LoraRtError: none of them has it.
    """
    if scene is None:
        return
    turns = scene_turns(scene) if "[" in scene else [(None, scene)]
    if not turns:
        raise UsageError(f"{scene!r} is not a scene", next_step="Write a scene type, or: logic body[So:]")
    opened = session()
    compositions = [named_composition(term, opened.registry.compositions) for term in composition.terms]
    cards = [item.card for item in adapters if item.card and opened.modes.implements(item.card.mode, "lora_rt_scene")]
    known = dict.fromkeys(kind for card in [*cards, *compositions] if card for kind in card.scene_types)
    unknown = [kind for _, kind in turns if kind not in (*known, _NEUTRAL)]
    if unknown and known:
        text = f"there is no scene type {' or '.join(map(repr, unknown))}"
        raise LoraRtError(text, next_step=f"The scene types here are: {', '.join(known)}")
    if unknown:
        text = f"no adapter in use tells scenes apart, so the scene type {scene} may change nothing"
        warn(text)


def caution(composition: Composition, base: str | None = None) -> None:
    """One line on standard error about weights that nobody measured: what comes of them may be no text at all.

    Once per kind: whoever turns a knob in a chat knows it then.
    """
    found = outside(_weights(composition), None if base is None else identify_base(base).id)
    if found.keys() - session().told - {"base"}:
        session().told.update(found)
        warn("; ".join(found.values()))


def normalized(composition: Composition, limit: float | None) -> Composition:
    """The composition with the sum of |weight| at most the limit, where there is one; says what it did.

    Raises:
        LoraRtError: the limit is not above 0.
    """
    if limit is None:
        return composition
    total = sum(abs(weight) for _, weight in _weights(composition))
    found = composition.normalized(limit, total)
    if found is not composition:
        told = f"normalized: the weights added up to {total:g}, each was multiplied by {limit / total:.4g}: {found}"
        err.print(f"[dim]{escape(told)}[/]", soft_wrap=not err.is_terminal)
    return found


def _weights(composition: Composition) -> list[tuple[str, float]]:
    registry = session().registry
    return [(r.text, weight) for term in composition.terms for r, weight in _references(term, registry)]


def _references(term: Term, registry: Registry) -> list[tuple[Reference, float]]:
    """The adapters of a term and their weights: its own, or those of a named composition."""
    named = named_composition(term, registry.compositions)
    if named is None:
        return [(term.reference, term.weight)]
    return [(Reference.parse(item.reference), term.weight * item.mean_weight) for item in named.terms]
