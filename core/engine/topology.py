"""Where adapters can act: every linear layer of a model, which of them read the same input, and where the heads lie.

Nothing of it is read off names or classes of architectures: the model is run, and who got what is noted. Of a block

    x ──┬──► q_proj (576, 576)      group 0: one A for all three, since they get the very same tensor
        ├──► k_proj (192, 576)      group 0
        └──► v_proj (192, 576)      group 0
    h ──────► o_proj (576, 576)     group 1
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.fused import PackedMatrices
from lora_rt.core.base.reading import UNREADABLE as UNRUNNABLE
from lora_rt.core.base.shape import ForwardPass, blocks_of, device_of, vocabulary_of
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError, first_line
from lora_rt.core.engine.experts import find_parameters, watched_experts, watched_products
from lora_rt.core.engine.heads import HeadAxis, find_heads
from lora_rt.core.engine.layout import PROBES, Layout, layout_of
from lora_rt.core.engine.wrappers import bare_modules, inner_of
from lora_rt.core.multiply.product import looking


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer. `layer` is its block's number, or None outside; `group` unites sites with one input.

    `layout` says how rows and tokens lie in that input; None where that can't be told, as with an expert of several.
    `device` is where its output lies: layers of one model may lie on several. A site may be a parameter of the module:
    `leaf` then names it, and `experts` is how many matrices it holds, 0 for one (see `experts.py`).
    `embeds` marks an embedding, whose input are token ids or positions: `in_features` of them, looked up instead of
    multiplied.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    layer: int | None
    group: int
    device: torch.device
    layout: Layout | None = ("b", "t")
    leaf: str = ""
    experts: int = 0
    embeds: bool = False


class Topology:
    """All sites of a model, in the order in which a forward pass meets them."""

    def __init__(self, sites: list[Site], find: Callable[[], Mapping[str, HeadAxis]] = dict) -> None:
        self.sites = sites
        self._find = find
        self.by_name: Mapping[str, int] = {site.name: index for index, site in enumerate(sites)}
        self.leaves: dict[nn.Module, dict[str, int]] = {}  # module -> its parameters that are sites, and their numbers
        for index, site in enumerate(sites):
            if site.leaf:
                self.leaves.setdefault(site.module, {})[site.leaf] = index

    @cached_property
    def heads(self) -> Mapping[int, HeadAxis]:
        """Site number -> where attention heads lie on it. Found when it is first asked for, with passes of its own."""
        return {self.by_name[name]: axis for name, axis in self._find().items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Site name -> (out_features, in_features), or (experts, out_features, in_features)."""
        return {s.name: (*((s.experts,) if s.experts else ()), s.out_features, s.in_features) for s in self.sites}

    def groups_of(self, adapters: Sequence[Container[str]]) -> dict[int, list[int]]:
        """Group -> the indices of its sites, of those where at least one of the adapters acts."""
        members: dict[int, list[int]] = {}
        for index, site in enumerate(self.sites):
            if any(site.name in adapter for adapter in adapters):
                members.setdefault(site.group, []).append(index)
        return members


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every linear layer: torch's and its subclasses (bitsandbytes'), GPT-2's Conv1D, and strangers.

    A stranger (of GPTQ, AWQ, HQQ, torch.ao, ...) says how many features it takes and gives; what lies in it is its own.
    Layers that a model's own code makes something else of (routers that return more than a product, Llama 4's among
    them; projections in groups, DeepSeek V4's) are left out: what they give is not W x.
    """
    found: dict[str, nn.Module] = {}
    for name, module in bare_modules(model):
        # Of a wrapper that says it is linear and the linear layer in it, the outer one: what it gives goes on.
        if _says_linear(module) and not _is_own(module) and not _parents(name) & found.keys():
            found[name] = module
    return found


def _says_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # exporting knows sites, and is imported without transformers

    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _is_own(module: nn.Module) -> bool:
    """Whether a model's own code makes something else of it than a product with its weight, told by trying it."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("transformers.models.")]
    if not isinstance(module, nn.Linear) or not any("forward" in vars(kind) for kind in kinds):
        return False
    x = torch.ones(2, 3, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    x[1] = -0.5  # two signs: what is done besides the product (a softmax, a choice) shows in one of them
    try:
        with torch.no_grad():
            y, wanted = type(module).forward(module, x), nn.functional.linear(x, module.weight, module.bias)
            return not isinstance(y, Tensor) or y.shape != wanted.shape or not _alike(y, wanted)
    except UNRUNNABLE:
        return True


def _alike(y: Tensor, wanted: Tensor) -> bool:
    try:
        return torch.allclose(y.float(), wanted.float(), atol=0.05, rtol=0.05)
    except RuntimeError:  # of a tensor without values, whose shape has to do
        return True


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features). Not read off the weight: a quantized one is packed, a Conv1D's is transposed."""
    if (sizes := getattr(module, "out_features", None)) is not None:
        return int(sizes), int(module.in_features)  # type: ignore[arg-type]
    rows, columns = module.weight.shape  # type: ignore[misc]  # Conv1D: (in, out)
    return int(columns), int(rows)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What `Topology.shapes` says, of a model that need not run: on the meta device, or under PEFT."""
    parameters = find_parameters(model)
    fused = {n: (*((p.experts,) if p.experts else ()), p.out_features, p.in_features) for n, p in parameters.items()}
    return {name: features(module) for name, module in find_linears(model).items()} | fused


def embeddings_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The same of the embeddings that an adapter can act on: name -> (features, tokens or positions)."""
    return {name: (module.embedding_dim, module.num_embeddings) for name, module in _find_embeddings(model).items()}


def is_turned(topology: Topology, name: str) -> bool:
    """Whether a site's weight lies as (in, out): a Conv1D's, or an embedding's."""
    site = topology.sites[topology.by_name[name]]
    return site.embeds or type(site.module).__name__ == "Conv1D"


def _nameless(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Layers of unknown classes with tensors of their own, which may be linear without saying so."""
    return {
        name: module
        for name, module in bare_modules(model)
        if name not in linears
        and not _parents(name) & linears.keys()
        and not isinstance(module, PackedMatrices)
        and not type(module).__module__.startswith(("torch.nn.", "transformers."))
        and next(module.children(), None) is None
        and (next(module.parameters(), None) is not None or next(module.buffers(), None) is not None)
    }


def multiplies(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a layer that made y of x, both (..., n), is a product with a matrix, told by what it does.

    Sums go through it (up to what quantized inputs lose), and one feature reaches several: a norm fails the first, a
    scale the second.
    """
    if not x.is_floating_point() or x.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        return False
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(x.shape, generator=generator).to(x) for _ in range(2))
    single = torch.zeros_like(x)
    single[..., 0] = 1.0  # what comes of it is the first column of the matrix
    with torch.no_grad():
        zero = module(torch.zeros_like(x)).float()  # the bias
        alone, both = module(one).float() + module(other).float() - 2 * zero, module(one + other).float() - zero
        column = (module(single).float() - zero).abs().flatten(0, -2)[0]
    adds_up = (both - alone).abs().max() <= 0.1 * both.std()
    return bool(adds_up and (column > 0.01 * column.max()).sum() > 1)


def block_number(name: str) -> int | None:
    """The number of the block that a layer of this name lies in; None outside the blocks (an output head)."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def layer_numbers(model: Any) -> Callable[[str], int | None]:
    """Says of a layer's name in which of the model's blocks it lies; None outside of them."""
    blocks = blocks_of(model)
    count = len(blocks)
    inside = next((f"{name}." for name, module in bare_modules(model) if module is blocks), "")

    def number(name: str) -> int | None:
        found = block_number(name[len(inside) - 1 :] if inside and name.startswith(inside) else name)
        return found if found is not None and found < count else None

    return number


def survey(model: Any) -> Topology:
    """Run two short forward passes and note what each linear layer gets: how rows and tokens lie, and who shares it.

    The passes also make bitsandbytes repack its 4-bit weights for CPU inference, once and before anything else runs:
    the repack is a race between threads and changes the weights' bytes.

    Raises:
        BaseError: the model can't be run.
    """
    linears = find_linears(model)
    strangers = _nameless(model, linears)
    passes = [_watched(model, linears | strangers, rows, tokens) for rows, tokens in PROBES]
    sizes = {name: features(module) for name, module in linears.items()}
    for name, (x, y) in {call.name: (call.x, call.y) for call in passes[0] if call.name in strangers}.items():
        if multiplies(strangers[name], x, y):
            linears[name], sizes[name] = strangers[name], (y.shape[-1], x.shape[-1])
    # A layer that is called twice in a pass (shared between blocks) counts where it first was: reversed, so that the
    # first call is the one that stays.
    calls = {call.name: call for call in reversed(passes[0]) if call.name in linears}
    # Layers that the pass did not reach, e.g. idle experts, come last and stand alone.
    order = list(dict.fromkeys([*(call.name for call in passes[0] if call.name in linears), *linears]))
    devices = {n: calls[n].y.device if n in calls else _device_of(linears[n], device_of(model)) for n in order}
    groups = _groups(order, calls, devices)
    layouts = _layouts(linears, [{call.name: call.x for call in reversed(one)} for one in passes])
    layer = layer_numbers(model)
    sites = []
    for name in order:
        made = Site(name, linears[name], *sizes[name], layer(name), groups[name], devices[name], layouts[name])
        sites.append(made)
    for name, one in find_parameters(model).items():
        got = [x for calls in passes for x in [c.x for c in calls if c.name == name][:1]]
        if one.experts or len(got) == len(PROBES):  # a router's is one only where a pass multiplies with it
            device = getattr(one.module, one.leaf).device
            layout = layout_of(got) if len(got) == len(PROBES) else None
            # A group of its own: any number that no other site has, and len(sites) grows with every site.
            place = (layer(name), len(groups) + len(sites), device, layout, one.leaf, one.experts)
            sites.append(Site(name, one.module, one.out_features, one.in_features, *place))
    return Topology([*sites, *_embeddings(model, len(groups) + len(sites))], lambda: find_heads(model, linears, sizes))


def _embeddings(model: Any, group: int) -> list[Site]:
    """A site for each of the embeddings, each a group of its own."""
    return [
        Site(n, m, m.embedding_dim, m.num_embeddings, None, group + i, _device_of(m, device_of(model)), embeds=True)
        for i, (n, m) in enumerate(_find_embeddings(model).items())
    ]


def _find_embeddings(model: Any) -> dict[str, nn.Embedding]:
    """The model's embedding and others that lie outside the blocks (of positions)."""
    own = inner_of(model.get_input_embeddings())
    return {
        name: module
        for name, module in bare_modules(model)
        if isinstance(module, nn.Embedding) and (module is own or (_looks_up(module) and block_number(name) is None))
    }


def _looks_up(module: nn.Embedding) -> bool:
    """Whether it gives the rows that it is asked for; a subclass may ask for others than it is given (OPT's)."""
    return type(module).forward is nn.Embedding.forward


@dataclass(frozen=True, slots=True)
class _Call:
    """What a layer got and gave. Kept, so that the address of an input is not used twice."""

    name: str
    x: Tensor
    y: Tensor


def _watched(model: Any, layers: Mapping[str, nn.Module], rows: int, tokens: int) -> list[_Call]:
    """The calls of layers in one pass over rows that are alike, in their order."""
    calls: list[_Call] = []

    def note(name: str, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            calls.append(_Call(name, given[0], output))

    # Before hooks of others, which may move an output: adapters add to what the forward itself gives.
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output), prepend=True)
        for name, module in layers.items()
    ]
    handles += watched_experts(model, lambda name, x: calls.append(_Call(name, x, x)))
    ids = (torch.arange(tokens, device=device_of(model)) + 1).remainder(vocabulary_of(model.config)).repeat(rows, 1)
    forward = ForwardPass.of(model)
    try:
        # No inference mode: what is repacked now has to serve passes with gradients as well.
        with (
            libraries_silenced(),
            torch.no_grad(),
            looking(),
            watched_products(model, lambda name, x: calls.append(_Call(name, x, x))),
        ):
            model(**forward.arguments(ids))
    except UNRUNNABLE as error:
        text, advice = f"{type(model).__name__} can't be run", "Use another base or --precision, and report this one"
        if model.get_input_embeddings().weight.dtype == torch.float16:
            text, advice = f"{text} in float16, as int8 computes", "Use --precision int4, bfloat16 or float32"
        raise BaseError(f"{text}: {first_line(error)}", next_step=advice) from error
    finally:
        for handle in handles:
            handle.remove()
    # A model that computes with `layer.weight` itself reads the bytes of a packed one, and hands on integers.
    packed = [c.name for c in calls if isinstance(layers.get(c.name), nn.Linear) and not c.x.is_floating_point()]
    if packed:
        text = f"{type(model).__name__} takes the numbers of a packed weight for its own, and so breaks {packed[0]}"
        raise BaseError(text, next_step="Use --precision bfloat16 or float32")
    return calls


def _groups(order: Sequence[str], calls: Mapping[str, _Call], devices: Mapping[str, torch.device]) -> dict[str, int]:
    """Equal numbers for layers that read the very same tensor on one device."""
    numbers: dict[tuple[object, torch.device], int] = {}
    # The identity of the tensor, not its values: two inputs that are equal for this text need not be for another.
    keys = {name: (id(calls[name].x) if name in calls else name, devices[name]) for name in order}
    return {name: numbers.setdefault(key, len(numbers)) for name, key in keys.items()}


def _device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), otherwise)


def _layouts(linears: Mapping[str, nn.Module], inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Layout | None]:
    """The layout of each layer. One of several experts is shown some of the tokens, even where it once got all."""
    found: dict[str, Layout | None] = {}
    alike: dict[str, set[Layout | None]] = {}
    for name in linears:
        got = [calls[name] for calls in inputs if name in calls]
        found[name] = layout_of(got) if len(got) == len(inputs) else None
        alike.setdefault(_unnumbered(name), set()).add(found[name])
    return {name: layout if len(alike[_unnumbered(name)]) == 1 else None for name, layout in found.items()}


def _unnumbered(name: str) -> str:
    """The name without the numbers of its block and its expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".#", name)
