"""The columns of the table that are no PEFT: the base alone, lora-rt itself, and llama.cpp.

The plain loop is the denominator of every ratio, and PEFT runs in it too: a cache, one forward pass a step, tokens that
stay on the device until the end. It gives its models the best that a plain loop can give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_rt.core.base.default import gguf_file
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.workloads import SAMPLED, Mix, Workload
from lora_rt.core.engine.topology import features
from lora_rt.core.export.gguf import write_gguf_adapter
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.llama_cpp.server import LlamaServer
from lora_rt.core.requests.reading import read_adapter
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.manager import load_modes
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.registry import Registry

_CONTEXT = 1024  # tokens of llama.cpp's


class Turn(NamedTuple):
    """One run of a workload: seconds of the prompt with the first token, seconds of the steps behind it, the tokens."""

    prefill: float
    decode: float
    tokens: list[list[int]]  # (rows, steps): the check that the work was done, and that all do the same


class System:
    """Heavy parts are loaded by the first `prepare`."""

    name = ""
    changes = 10  # how many changes of composition are timed at once

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def reason(self, workload: Workload) -> str | None:
        """Why it cannot do this workload, in a few words; None where it can."""
        return None

    def prepare(self, workload: Workload) -> None:
        """Load what the workload needs, from whatever state; before every turn, and outside of its time."""

    def run(self, workload: Workload) -> Turn:
        """Decode every row."""
        raise NotImplementedError

    def change(self, mix: Mix) -> None:
        """The way from the composition before to this one."""
        raise NotImplementedError


def timed(lab: Lab, begin: Callable[[], Iterator[Any]]) -> Turn:
    """Times the beginning and the first step of a loop as prefill, and all other steps as decoding.

    Args:
        lab: whose clock it is.
        begin: starts the loop; each step yields a token per row, (rows,).
    """
    start = lab.now()
    steps = begin()
    said = [next(steps)]
    first = lab.now()
    said.extend(steps)
    last = lab.now()
    tokens: list[list[int]] = torch.stack([torch.as_tensor(step) for step in said], dim=1).tolist()
    return Turn(first - start, last - first, tokens)


def run_plainly(lab: Lab, model: Any, workload: Workload, **arguments: Any) -> Turn:
    """The plain loop over a model; `arguments` go with every pass."""
    prompts = lab.prompts(workload)
    choose = chooser(workload, lab.device)
    return timed(lab, lambda: _steps(model, prompts, workload.steps, choose, arguments))


def _steps(
    model: Any, prompts: Sequence[Sequence[int]], steps: int, choose: Callable[..., Tensor], arguments: dict[str, Any]
) -> Iterator[Tensor]:
    """Yields the next token of every row, (rows,), after the prompt and after each further step."""
    from transformers import DynamicCache

    ids = torch.tensor(prompts, device=model.device)
    said = ids[:, :0]
    cache = DynamicCache(config=model.config)
    for _ in range(steps):
        with torch.inference_mode():
            last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # a slice is slow on a CPU: see `base/shape.py`
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last, **arguments)
            ids = choose(said, output.logits[:, -1])
            said = torch.cat([said, ids], dim=1)
        yield ids[:, 0]


def chooser(workload: Workload, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(tokens said (rows, steps), logits (rows, vocab)) -> tokens (rows, 1), by transformers' own processors."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    if not workload.sampled:
        return lambda _said, logits: logits.argmax(-1, keepdim=True)
    generator = torch.Generator(device).manual_seed(0)
    penalty = RepetitionPenaltyLogitsProcessor(SAMPLED["repetition_penalty"])
    warpers = TemperatureLogitsWarper(SAMPLED["temperature"]), TopPLogitsWarper(SAMPLED["top_p"])
    process = LogitsProcessorList([penalty, *warpers])
    return lambda said, logits: process(said, logits.float()).softmax(-1).multinomial(1, generator=generator)


class BaseAlone(System):
    """The plain loop, without any adapter."""

    name = "base"

    @cached_property
    def _model(self) -> Any:
        return self.lab.model()

    def reason(self, workload: Workload) -> str | None:
        """It has no composition, and nothing to train."""
        return {"change": "has no composition", "training": "trains nothing"}.get(workload.kind)

    def run(self, workload: Workload) -> Turn:
        """What the base says."""
        return run_plainly(self.lab, self._model, workload)


class Generate(BaseAlone):
    """`model.generate`: what people run. Its streamer tells prefill and decoding apart."""

    name = "generate"

    def reason(self, workload: Workload) -> str | None:
        """The base alone stands for it in what is no decoding."""
        return None if workload.kind in ("decode", "prefill") else "as the base"

    def run(self, workload: Workload) -> Turn:
        """Prompt and steps by `generate`."""
        prompts = torch.tensor(self.lab.prompts(workload), device=self.lab.device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if workload.sampled:
            drawn = {"do_sample": True, "top_k": 0, **SAMPLED}
        bounds = {"max_new_tokens": workload.steps, "min_new_tokens": workload.steps, "pad_token_id": 0}
        watch = _Watch(self.lab)
        start = self.lab.now()
        output = self._model.generate(
            prompts, attention_mask=torch.ones_like(prompts), streamer=watch, **bounds, **drawn
        )
        first, last = watch.times[1], watch.times[-1]  # the streamer is given the prompt before anything is computed
        return Turn(first - start, last - first, output[:, workload.prompt_tokens :].tolist())


class _Watch:
    """A streamer (transformers' BaseStreamer) that notes when the prompt and each step came."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times.append(self._lab.now())

    def end(self) -> None:
        pass


class Ours(System):
    """One batch, every row under its own composition."""

    name = "ours"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._residents: dict[str, Path] = {}

    @cached_property
    def runtime(self) -> Runtime:
        """Over a module tree of its own."""
        base = replace(self.lab.base, model=self.lab.model())
        return Runtime(base, load_modes(), Registry(project=self.lab.folder))

    def prepare(self, workload: Workload) -> None:
        """Makes exactly the workload's adapters resident."""
        wanted = self.lab.adapters(workload)
        for name in [name for name, path in self._residents.items() if wanted.get(name) != path]:
            self.runtime.unload_adapter(name)
            del self._residents[name]
        for name, path in wanted.items():
            if name not in self._residents:
                self.runtime.load_adapter(str(path), name)
                self._residents[name] = path

    def run(self, workload: Workload) -> Turn:
        """One request, timed from the texts of its compositions on."""
        texts = [text_of(mix) for mix in workload.mixes]
        prompts, steps = self.lab.prompts(workload), workload.steps
        settings: dict[str, Any] = {"max_new_tokens": steps, "min_new_tokens": steps}
        if workload.sampled:
            settings |= {**SAMPLED, "seed": 0}
        return timed(self.lab, lambda: self.runtime.decode(prompts, texts, **settings))

    def change(self, mix: Mix) -> None:
        """From the text of a composition to the plan that a forward pass runs under."""
        self.runtime.plan([[0]], [text_of(mix)])


def text_of(mix: Mix) -> str | None:
    """The text of a composition."""
    return " ".join(f"{name}:{weight}" for name, weight in mix) or None


class LlamaCpp(System):
    """llama.cpp, by the server that `--engine llama.cpp` has: it puts no two scales into one batch, so rows take turns.

    Its base is a GGUF file in a quantization of its own (Q4_1 for the default base), so it need not say what the others
    say; its adapters are written by our exporter.
    """

    name = "llama.cpp"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._files: dict[str, Path] = {}
        self._server: LlamaServer | None = None

    def reason(self, workload: Workload) -> str | None:
        """It needs its package and a GGUF file of the base, and is no part of what processes measure."""
        if find_spec("xllamacpp") is None:
            return "xllamacpp is not installed"
        if self._gguf is None:
            return "no GGUF file of this base here"
        if workload.sampled:
            return "measured greedily alone"
        if workload.kind == "change":
            return "scales are a part of each request"
        return None if workload.kind in ("decode", "prefill") else "not measured"

    def prepare(self, workload: Workload) -> None:
        """The adapters as GGUF files, all loaded at once."""
        self._files = {name: self._export(path, name) for name, path in self.lab.adapters(workload).items()}
        if self._server is None or not set(self._files.values()) <= set(self._server.adapters):
            if self._server is not None:
                self._server.close()
            assert self._gguf is not None
            threads = torch.get_num_threads()  # as many as everybody has
            self._server = LlamaServer(self._gguf, list(self._files.values()), _CONTEXT, str(self.lab.device), threads)

    def run(self, workload: Workload) -> Turn:
        """The rows one by one: their times add up."""
        turns = [
            timed(self.lab, partial(self._steps, prompt, mix, workload.steps))
            for prompt, mix in zip(self.lab.prompts(workload), workload.mixes, strict=True)
        ]
        prefill, decode = sum(turn.prefill for turn in turns), sum(turn.decode for turn in turns)
        return Turn(prefill, decode, [turn.tokens[0] for turn in turns])

    def _steps(self, prompt: Sequence[int], mix: Mix, steps: int) -> Iterator[list[int]]:
        """The most likely token behind the prompt and behind each further step, as the only row."""
        assert self._server is not None
        ids, scales = list(prompt), {self._files[name]: weight for name, weight in mix}
        greedy = Sampling.given(temperature=0)
        for said in range(steps):
            token = self._server.next_token(ids, said, scales, greedy, 0)
            ids.append(ids[-1] if token is None else token)  # it would end here, and the others go on
            yield ids[-1:]

    def _export(self, path: Path, name: str) -> Path:
        file = path / "adapter.gguf"
        if not file.exists():
            shapes = {name: features(module) for name, module in self.lab.linears.items()}
            inspected = inspect_adapter(path, name=name, linears=shapes, base=self.lab.base.identity, load=True)
            write_gguf_adapter(file, read_adapter(inspected, name).factors, self.lab.base.model.config)
        return file

    @property
    def _gguf(self) -> Path | None:
        return None if self.lab.origin.random is not None else gguf_file(self.lab.origin.base)
