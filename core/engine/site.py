"""Hooks a linear layer up to the engine without changing the module tree or a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from lora_rt.core.base.fused import Pairs, are_experts, given_to_experts, run_experts
from lora_rt.core.engine.experts import ProductsOfParameters
from lora_rt.core.engine.plan import in_a_pass, running_pass
from lora_rt.core.engine.topology import Topology
from lora_rt.core.engine.wrappers import inner_of, is_compiled
from lora_rt.core.multiply.cpu_4bit import direct_forward
from lora_rt.core.multiply.product import Product


class _Hooked:
    """A forward in place of a module's own, for as long as somebody uses it.

    Set as an instance attribute rather than by wrapping the module: names, parameters and the state dict stay as they
    were, and no second module call is paid. Several banks over one model share it, and close in any order.
    """

    def __init__(self, module: nn.Module, own: Callable[..., Any]) -> None:
        self.module = module
        self.own = own
        self.before: Any = vars(module).get("forward")  # what a user, or accelerate, has put there
        self.users: dict[Any, int] = {}
        module.forward = self

    def leave(self, user: Any) -> None:
        """The last one gives the module its own forward back, unless somebody has put another one around this."""
        self.users.pop(user, None)
        if self.users or vars(self.module).get("forward") is not self:
            return
        before = self.before
        while isinstance(before, _Hooked) and not before.users:  # of a bank that was closed before this one
            before = before.before
        if before is None:
            del self.module.forward
        else:
            self.module.forward = before

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.own(*args, **named)


class _Adapted(_Hooked):
    """A layer's forward, and what the running pass adds. Its users are topologies, each with its number for the layer.

    Another model, or another bank over this one, may be in the same thread: its pass is none of theirs.
    """

    def __call__(self, x: Tensor, *rest: Any, **named: Any) -> Any:
        current = running_pass()
        if current is None or (index := self.users.get(current.topology)) is None:
            return self.own(x, *rest, **named)
        if isinstance(self.own, Product):
            if not current.acts(index):
                return self.own(x)
            if self.own.can_add(x) and (added := current.added(index, x)) is not None:
                return self.own.with_added(x, added)
            # A sum that is made in float32 is rounded once, with what the adapters add to it.
            return current.add(index, x, self.own.unrounded(x, current.widened)).to(x.dtype)
        return current.add(index, x, self.own(x, *rest, **named))

    def unrounded(self, x: Tensor, wide: Tensor) -> Tensor:
        """The same sum before it is rounded; see the function of this name."""
        current = running_pass()
        if current is None or (index := self.users.get(current.topology)) is None:
            return _product(self.own, x, wide)
        current.knows(x, wide)
        own = self.own
        if isinstance(own, Product) and own.can_add(x) and (added := current.added(index, x)) is not None:
            return own.with_added(x, added)
        return current.add(index, x, own.unrounded(x, current.widened) if isinstance(own, Product) else own(x))


class _AdaptedParameters(_Hooked):
    """The forward of a module whose parameters are sites: a router's, or fused experts'."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        current = running_pass()
        if current is None or current.topology not in self.users:
            return self.own(*args, **named)
        sites = {leaf: n for leaf, n in current.topology.leaves[self.module].items() if current.acts(n)}
        if not sites:
            return self.own(*args, **named)
        if not are_experts(self.module):
            parameters = {leaf: getattr(self.module, leaf) for leaf in sites}
            with ProductsOfParameters(parameters, lambda leaf, x, y: current.add(sites[leaf], x, y)):
                return self.own(*args, **named)

        def add(leaf: str, x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
            return current.add_pairs(sites[leaf], x, y, pairs) if leaf in sites else y

        return run_experts(self.module, *given_to_experts(args, named), add)


class _Bare(_Hooked):
    """The forward of what PEFT or torch.compile has wrapped: in a pass of ours that of the module itself."""

    def __init__(self, module: nn.Module, own: Callable[..., Any]) -> None:
        super().__init__(module, own)
        self._inner = inner_of(module)
        self._compiled = is_compiled(module)

    def __call__(self, *given: Any, **named: Any) -> Any:
        if not in_a_pass():
            return self.own(*given, **named)
        # What PEFT's layers are told besides, such as the names of its adapters, is none of the layer's.
        return self._inner(*given, **named) if self._compiled else self._inner(given[0])


class _Replaced(_Hooked):
    """The forward of a module that adapters may hold as a whole: that of the running pass's, where it has one."""

    name = ""

    def __call__(self, *args: Any, **named: Any) -> Any:
        current = running_pass()
        twin = current.twins.get(self.name) if current is not None and current.topology in self.users else None
        return self.own(*args, **named) if twin is None else twin(*args, **named)


def unrounded(layer: nn.Module, x: Tensor, wide: Tensor) -> Tensor:
    """What calling a linear layer gives, with all that a running pass adds, as it is made.

    Args:
        x: (..., in) in the dtype of the layer.
        wide: the same numbers in float32.

    Returns:
        (..., out) in float32 where the product is made so; the layer would round it to the dtype of x.
    """
    forward = vars(layer).get("forward")
    if layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x.clone()).clone()  # type: ignore[no-any-return]  # what a hook has seen may be kept by it
    return forward.unrounded(x, wide) if type(forward) is _Adapted else _product(forward or layer, x, wide)


class Multiplied(NamedTuple):
    """How a linear layer is multiplied: its forward as it stands, its product, and its number in each topology."""

    forward: Any
    product: Product
    numbers: Mapping[Any, int]


def multiplied(layer: nn.Module) -> Multiplied | None:
    """How a linear layer is multiplied; None where it isn't by a product of ours, or somebody watches it."""
    forward = vars(layer).get("forward")
    own, numbers = (forward.own, forward.users) if type(forward) is _Adapted else (forward, {})
    if layer._forward_hooks or layer._forward_pre_hooks or not isinstance(own, Product):
        return None
    return Multiplied(forward, own, numbers)


def _product(forward: Callable[[Tensor], Tensor], x: Tensor, wide: Tensor) -> Tensor:
    if isinstance(forward, Product):
        return forward.unrounded(x, lambda _x, _like: wide)
    return forward(x)


def hook_up(topology: Topology) -> ExitStack:
    """Let every site's forward add what the running pass says; outside a pass it is the layer's own forward.

    Returns:
        What takes the hooks off again when it is closed.
    """

    def hooked(module: nn.Module) -> _Hooked:
        # The short way would pass by what a user has put around the layer's forward.
        return _Adapted(module, module.forward if "forward" in vars(module) else direct_forward(module))

    layers = [(site.module, index) for index, site in enumerate(topology.sites) if not site.leaf]
    with ExitStack() as undo:
        undo.enter_context(_hooked(layers, topology, _Adapted, hooked))
        owners = ((module, 0) for module in topology.leaves)
        fused = _hooked(owners, topology, _AdaptedParameters, lambda module: _AdaptedParameters(module, module.forward))
        undo.enter_context(fused)
        return undo.pop_all()


def pass_by(wrappers: Iterable[nn.Module], user: object) -> ExitStack:
    """Let passes of ours go by what PEFT has wrapped around layers; everybody else's go through it as before."""
    return _hooked(((module, 0) for module in wrappers), user, _Bare, lambda module: _Bare(module, module.forward))


def let_replace(modules: Mapping[str, nn.Module], topology: Topology) -> ExitStack:
    """Let modules' forwards be those of the running pass's modules of the same names."""
    names = {id(module): name for name, module in modules.items()}

    def hooked(module: nn.Module) -> _Hooked:
        made = _Replaced(module, module.forward)
        made.name = names[id(module)]
        return made

    return _hooked(((module, 0) for module in modules.values()), topology, _Replaced, hooked)


def _hooked(
    modules: Iterable[tuple[nn.Module, int]], user: object, kind: type[_Hooked], hook: Callable[[nn.Module], _Hooked]
) -> ExitStack:
    with ExitStack() as undo:
        for module, number in modules:
            there = vars(module).get("forward")
            found = there if isinstance(there, kind) else hook(module)
            found.users[user] = number
            undo.callback(found.leave, user)
        return undo.pop_all()
