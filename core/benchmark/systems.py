"""The columns of the table: what each system loads for a workload, and how it runs it.

The plain loop is the denominator of every ratio, and PEFT runs in it too: a cache, one forward pass a step, tokens that
stay on the device until the end. It gives its models the best that a plain loop can give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, generation

from lora_rt.core.base.default import gguf_file
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.benchmark.bare import activate, with_adapters
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.workloads import SAMPLED, Mix, Workload, text_of
from lora_rt.core.export.gguf import write_gguf_adapter
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.llama_cpp.server import LlamaServer
from lora_rt.core.requests.reading import read_adapter
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.manager import load_modes
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.registry import Registry

_CONTEXT = 1024  # tokens of llama.cpp's
_MIX = "mix"


class Turn(NamedTuple):
    """One run of a workload: seconds of the prompt with the first token, seconds of the steps behind it, the tokens."""

    prefill: float
    decode: float
    tokens: list[list[int]]  # (rows, steps): the check that the work was done, and that all do the same


class System(NamedTuple):
    """A system that has loaded what its workload needs."""

    run: Callable[[], Turn]  # decodes every row
    change: Callable[[Mix], object] = lambda _mix: None  # the way from the composition before to this one
    # Before every turn, and outside of its time: undoes what another system or a change has left.
    prepare: Callable[[], None] = lambda: None
    changes: int = 10  # how many are timed at once


Load = Callable[[Lab, Workload], AbstractContextManager[Mapping[str, System]]]
"""Loads the systems that share a model, by name; what they hold is given back when the block ends."""


@contextmanager
def plain(lab: Lab, workload: Workload) -> Iterator[dict[str, System]]:
    """The base alone, without any adapter: by the plain loop, and by `model.generate`, which is what people run."""
    model = lab.model()
    run, generate = (partial(way, lab, model, workload) for way in (run_plainly, run_by_generate))
    yield {"base": System(run), "generate": System(generate)}


def timed(lab: Lab, begin: Callable[[], Iterator[Any]]) -> Turn:
    """Times the beginning of a loop, whose steps yield a token per row (rows,), and the first one as prefill."""
    start = lab.now()
    steps = begin()
    said = [next(steps)]
    first = lab.now()
    said.extend(steps)
    last = lab.now()
    return Turn(first - start, last - first, torch.stack([torch.as_tensor(step) for step in said], dim=1).tolist())


def run_plainly(lab: Lab, model: Any, workload: Workload, **arguments: Any) -> Turn:
    """The plain loop over a model; `arguments` go with every pass."""
    prompts, choose = lab.prompts(workload), chooser(workload, lab.device)

    def steps() -> Iterator[Tensor]:
        ids = torch.tensor(prompts, device=lab.device)
        said, cache = ids[:, :0], DynamicCache(config=model.config)
        for _ in range(workload.steps):
            with torch.inference_mode():
                last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # a slice is slow on a CPU: `base/shape.py`
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last, **arguments)
                ids = choose(said, output.logits[:, -1])
                said = torch.cat([said, ids], dim=1)
            yield ids[:, 0]

    return timed(lab, steps)


def chooser(workload: Workload, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(tokens said (rows, steps), logits (rows, vocab)) -> tokens (rows, 1), by transformers' own processors."""
    if not workload.sampled:
        return lambda _said, logits: logits.argmax(-1, keepdim=True)
    generator = torch.Generator(device).manual_seed(0)
    penalty = generation.RepetitionPenaltyLogitsProcessor(SAMPLED["repetition_penalty"])
    heat = generation.TemperatureLogitsWarper(SAMPLED["temperature"])
    process = generation.LogitsProcessorList([penalty, heat, generation.TopPLogitsWarper(SAMPLED["top_p"])])
    return lambda said, logits: process(said, logits.float()).softmax(-1).multinomial(1, generator=generator)


def run_by_generate(lab: Lab, model: Any, workload: Workload) -> Turn:
    """`model.generate`; its streamer is given the prompt before anything is computed, and then each step's tokens."""
    prompts = torch.tensor(lab.prompts(workload), device=lab.device)
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if workload.sampled:
        drawn = {"do_sample": True, "top_k": 0, **SAMPLED}
    bounds = {"max_new_tokens": workload.steps, "min_new_tokens": workload.steps, "pad_token_id": 0}
    times: list[float] = []
    watch = SimpleNamespace(put=lambda _tokens: times.append(lab.now()), end=lambda: None)
    start = lab.now()
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), streamer=watch, **bounds, **drawn)
    return Turn(times[1] - start, times[-1] - times[1], output[:, workload.prompt_tokens :].tolist())


@contextmanager
def ours(lab: Lab, workload: Workload) -> Iterator[dict[str, System]]:
    """lora-rt: one batch, every row under its own composition."""
    with runtime_of(lab, workload) as runtime:
        yield {"ours": system_over(runtime, lab, workload)}


def runtime_of(lab: Lab, workload: Workload) -> Runtime:
    """A runtime in which exactly the workload's adapters are resident."""
    runtime = Runtime(replace(lab.base, model=lab.model()), load_modes(), Registry(project=lab.folder))
    for name, path in lab.adapters(workload).items():
        runtime.load_adapter(path, name)
    return runtime


def system_over(runtime: Runtime, lab: Lab, workload: Workload) -> System:
    """One request, and changes from the text of a composition to the plan that a forward pass runs under."""
    texts, prompts = [text_of(mix) for mix in workload.mixes], lab.prompts(workload)
    steps: dict[str, Any] = {"max_new_tokens": workload.steps, "min_new_tokens": workload.steps, "seed": 0}
    decode = partial(runtime.decode, prompts, texts, **steps, **(SAMPLED if workload.sampled else {}))
    return System(partial(timed, lab, decode), lambda mix: runtime.plan([[0]], [text_of(mix)]))


@contextmanager
def peft(lab: Lab, workload: Workload) -> Iterator[dict[str, System]]:
    """PEFT in the three ways that its manual has for several adapters over one base.

    They take turns on one PeftModel: what is active is its state, set before each turn.

    - set: `set_adapter([...])` and `set_scale`; every layer loops over the active adapters.
    - cat: `add_weighted_adapter(cat)`, one adapter in whose ranks all of them stand, made anew for each composition.
    - mixed: `adapter_names=[...]`; every row has one adapter, and none has a weight.
    """
    adapters = lab.adapters(workload)
    with libraries_silenced():
        model = with_adapters(lab.model(), [(name, 1.0, path) for name, path in adapters.items()]).eval()

    def concatenate(mix: Mix) -> None:
        names, weights = [name for name, _ in mix], [weight for _, weight in mix]
        model.add_weighted_adapter(names, weights, _MIX, combination_type="cat")
        model.base_model.set_adapter([_MIX], inference_mode=True)

    def prepare(change: Callable[[Mix], None]) -> None:
        activate(model, [(name, 1.0) for name in adapters])  # a scale that stayed would count twice in the other ways
        if _MIX in model.peft_config:
            model.delete_adapter(_MIX)
        if workload.active and workload.kind != "change":
            change(workload.mix(0))

    def run(**arguments: Any) -> Turn:
        with nullcontext() if workload.active else model.disable_adapter():
            return run_plainly(lab, model, workload, **arguments)

    use, each = partial(activate, model), [name for mix in workload.mixes for name, _ in mix]
    yield {
        "peft-set": System(run, use, partial(prepare, use)),
        # A change takes a part of a second, and leaves an adapter.
        "peft-cat": System(run, concatenate, partial(prepare, concatenate), changes=1),
        "peft-mixed": System(partial(run, adapter_names=each), prepare=partial(prepare, use)),
    }


@contextmanager
def llama_cpp(lab: Lab, workload: Workload) -> Iterator[dict[str, System]]:
    """llama.cpp, by the server that `--engine llama.cpp` has: it puts no two scales into one batch, so rows take turns.

    Its base is a GGUF file in a quantization of its own (Q4_1 for the default base), so it need not say what the others
    say; its adapters are written by our exporter.
    """
    files = {name: path / "adapter.gguf" for name, path in lab.adapters(workload).items()}
    for name, file in files.items():
        if not file.exists():
            adapter = read_adapter(inspect_adapter(file.parent, name=name, load=True), name)
            write_gguf_adapter(file, adapter.factors, lab.base.model.config)
    base, threads = gguf_file(lab.origin.base), torch.get_num_threads()  # as many as everybody has
    assert base is not None
    greedy = Sampling.given(temperature=0)

    def steps(prompt: Sequence[int], mix: Mix) -> Iterator[list[int]]:
        ids, scales = list(prompt), {files[name]: weight for name, weight in mix}
        for said in range(workload.steps):
            token = server.next_token(ids, said, scales, greedy, 0)
            ids.append(ids[-1] if token is None else token)  # it would end here, and the others go on
            yield ids[-1:]

    def run() -> Turn:
        turns = [timed(lab, partial(steps, *row)) for row in zip(lab.prompts(workload), workload.mixes, strict=True)]
        prefill, decode = sum(turn.prefill for turn in turns), sum(turn.decode for turn in turns)
        return Turn(prefill, decode, [turn.tokens[0] for turn in turns])

    with closing(LlamaServer(base, list(files.values()), _CONTEXT, str(lab.device), threads)) as server:
        yield {"llama.cpp": System(run)}


_PEFT = dict.fromkeys(("peft-set", "peft-cat", "peft-mixed"), peft)
LOADERS: dict[str, Load] = {"base": plain, "generate": plain, "ours": ours, **_PEFT, "llama.cpp": llama_cpp}
"""All but what trains, which is measured in processes alone."""


@contextmanager
def loaded(
    lab: Lab, workload: Workload, names: Iterable[str], loaders: Mapping[str, Load] = LOADERS
) -> Iterator[dict[str, System]]:
    """The systems of these names, by the loaders of theirs."""
    with ExitStack() as stack:
        found: dict[str, System] = {}
        for load in dict.fromkeys(loaders[name] for name in names):
            found |= stack.enter_context(load(lab, workload))
        yield {name: found[name] for name in names}
