"""What was asked for: checked as far as possible before seconds are spent on loading a base."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_rt.core.cli.look_up import caution, check_scene, look_up, normalized
from lora_rt.core.cli.options import usage
from lora_rt.core.cli.session import session
from lora_rt.core.generation.messages import check_text
from lora_rt.core.generation.prompts import template_variables
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.llama_cpp.server import check_installed
from lora_rt.core.requests.composition import Composition
from lora_rt.errors import UsageError

if TYPE_CHECKING:
    from lora_rt.core.generation.messages import Prompt
    from lora_rt.core.llama_cpp.runtime import LlamaRuntime
    from lora_rt.core.runtime import Runtime

# Where answers are sampled and nothing else is said. Chosen by reading: without a penalty the samples of a small base
# circle around one phrase. Greedy is greedy: the likeliest token.
TOP_P = 0.9
REPETITION_PENALTY = 1.1


TORCH, LLAMA_CPP = "torch", "llama.cpp"


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
