"""Answers by llama.cpp: one static composition at a time, streamed or whole, its weights part of each call."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_rt.core.generation.lengths import LengthError
from lora_rt.core.generation.messages import Prompt
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.generation.stopping import SpokenText
from lora_rt.core.llama_cpp.adapters import Adapters
from lora_rt.core.llama_cpp.base import GgufBase, open_base
from lora_rt.core.llama_cpp.server import LlamaServer, check_installed
from lora_rt.core.requests.answered import AdapterOrigin
from lora_rt.core.requests.composition import Composition, CompositionLike, per_row
from lora_rt.plugins.contract import BaseFacts
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry.registry import Registry

_LEAST_CONTEXT = 2048


class LlamaRuntime:
    """One GGUF base and the adapters that were asked for. What commands ask of a `Runtime` to speak has its names."""

    def __init__(self, base: GgufBase, adapters: Adapters, device: str) -> None:
        """Use `LlamaRuntime.load`."""
        self._base, self._adapters, self._device = base, adapters, device
        self._server: LlamaServer | None = None

    @classmethod
    def load(
        cls,
        base: str,
        *,
        registry: Registry,
        modes: ModeHost,
        precision: str = "int4",
        device: str = "auto",
        template_variables: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
    ) -> LlamaRuntime:
        """Open a base; llama.cpp loads it at the first answer, when it is known how long that may be.

        `precision` is what a base is converted to that is no GGUF file.

        Raises:
            LoraRtError: llama.cpp is not installed, or the base can't be used with it.
        """
        check_installed()
        opened = open_base(base, precision, template_variables, special_tokens=special_tokens)
        return cls(opened, Adapters(opened, base, registry, modes), device)

    @property
    def base(self) -> BaseFacts:
        """Facts about the base; its precision is the quantization of the GGUF file."""
        return self._base.facts

    @property
    def file(self) -> Path:
        """The GGUF file of the base."""
        return self._base.gguf

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, as transformers made it."""
        return self._base.text.tokenizer

    def terms(self, composition: CompositionLike) -> list[tuple[AdapterOrigin, float]]:
        """The adapters of a composition and their weights.

        Raises:
            LoraRtError: terms that can't be used, or not by llama.cpp; all of them are named.
        """
        given = Composition.of(composition)
        return [] if given is None else [(one.origin, one.weight) for one in self._adapters.of(given)]

    def generate(
        self,
        prompts: Sequence[Prompt],
        compositions: CompositionLike | Sequence[CompositionLike | None] | None = None,
        *,
        scenes: object = None,
        seed: int | None = None,
        deterministic: bool = False,
        **sampling: Any,
    ) -> list[str]:
        """The answers to several prompts, one after the other, each under its own composition or all under one.

        Args:
            prompts, compositions, sampling: as for `Runtime.generate`.
            scenes: read by nobody: what reads scenes is not spoken here.
            seed: of every answer.
            deterministic: an answer never depends on others here.

        Raises:
            LoraRtError: a prompt, composition or setting can't be used.
        """
        if not prompts:
            return []
        pairs = zip(prompts, per_row(compositions, len(prompts)), strict=True)
        streams = [self.stream(prompt, composition, seed=seed, **sampling) for prompt, composition in pairs]
        self.server({path for stream in streams for path in stream.scales}, max(s.most for s in streams))
        return ["".join(stream) for stream in streams]

    def stream(
        self,
        prompt: Prompt,
        composition: CompositionLike | None = None,
        *,
        scene: object = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> LlamaStream:
        """The answer to one prompt, piece by piece.

        Raises:
            LoraRtError: the prompt, the composition or a setting can't be used.
        """
        return LlamaStream(self, self._base, prompt, composition, Sampling.given(**sampling), seed)

    def scales(self, composition: CompositionLike | None) -> dict[Path, float]:
        """The file and the scale of each adapter of a composition that has a weight."""
        given = Composition.of(composition)
        found = [] if given is None else self._adapters.of(given)
        return {one.file: one.scale for one in found if one.scale != 0.0}

    def server(self, files: set[Path], tokens: int) -> LlamaServer:
        """llama.cpp with these adapters and room for so many tokens; loaded anew where it lacks something."""
        now = self._server
        if now is None or not files <= set(now.adapters) or tokens > now.context:
            before = [] if now is None else now.adapters
            room = max(_LEAST_CONTEXT, tokens, 0 if now is None else now.context)
            self.close()
            context = min(-(-room // 256) * 256, self._base.context)
            added = sorted(files - set(before))
            self._server = LlamaServer(self._base.gguf, [*before, *added], context, self._device)
        assert self._server is not None
        return self._server

    def close(self) -> None:
        """Give the memory back."""
        if self._server is not None:
            self._server.close()
            self._server = None


class LlamaStream(Iterator[str]):
    """The pieces of one answer as they are chosen; its composition can be changed between two of them."""

    unheard: Sequence[str] = ()
    """As of `RowStream`: nothing waits for a text here."""

    def __init__(
        self,
        runtime: LlamaRuntime,
        base: GgufBase,
        prompt: Prompt,
        composition: CompositionLike | None,
        sampling: Sampling,
        seed: int | None,
    ) -> None:
        self.scales = runtime.scales(composition)
        self._runtime, self._base, self._sampling = runtime, base, sampling
        self._seed = secrets.randbits(63) if seed is None else seed
        self._ids = base.text.prompt_ids(prompt)
        self._prompt = len(self._ids)
        if self._prompt >= base.context:
            text = f"the prompt has {self._prompt:,} tokens, and the base's context holds {base.context:,}"
            raise LengthError(text, next_step="Shorten it")
        self._spoken = SpokenText(base.text.tokenizer, sampling.stop)
        self._ended = False

    @property
    def most(self) -> int:
        """Tokens of the prompt and the longest answer that may follow."""
        return min(self._prompt + self._sampling.max_new_tokens, self._base.context)

    def compose(self, composition: CompositionLike | None) -> None:
        """Go on under another composition from the next token on; what was said so far is read again under it.

        Raises:
            LoraRtError: it can't be used; the stream then goes on as it was.
        """
        self.scales = self._runtime.scales(composition)

    def __next__(self) -> str:
        while not self._ended:
            if piece := self._step():
                return piece
        raise StopIteration

    def close(self) -> None:
        """Say no more."""
        self._ended = True

    def _step(self) -> str:
        server = self._runtime.server(set(self.scales), self.most)
        said = len(self._ids) - self._prompt
        token = server.next_token(self._ids, said, self.scales, self._sampling, self._seed)
        if token is None or token in self._base.text.end_ids:
            self._ended = True
            return self._spoken.rest()
        self._ids.append(token)
        piece = self._spoken.push(token)
        if self._spoken.stopped or len(self._ids) >= self.most:
            self._ended = True
            piece += self._spoken.rest()
        return piece
