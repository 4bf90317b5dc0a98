"""Hooks a linear layer up to the engine without changing the module tree or a weight."""

from __future__ import annotations

from torch import Tensor

from lora_rt.core.engine.cpu_4bit import Forward, direct_forward
from lora_rt.core.engine.plan import running_pass
from lora_rt.core.engine.topology import Topology


def hook_up(topology: Topology) -> None:
    """Let every site's forward add what the running pass says; outside a pass it is the layer's own forward.

    Set as an instance attribute rather than by wrapping the module: names, parameters and the state dict stay as they
    were, and no second module call is paid.
    """
    for index, site in enumerate(topology.sites):
        # The short way would pass by what another bank, or a user, has put around the layer's forward.
        wrapped = "forward" in vars(site.module)
        forward = site.module.forward if wrapped else direct_forward(site.module)
        site.module.forward = _with_adapters(forward, topology, index)


def _with_adapters(base_forward: Forward, topology: Topology, index: int) -> Forward:
    def forward(x: Tensor) -> Tensor:
        y = base_forward(x)
        current = running_pass()
        # Another model, or another bank over this one, may be in the same thread: its pass is none of ours.
        return y if current is None or current.topology is not topology else current.add(index, x, y)

    return forward
