"""A plan whose tensors lie in fixed places, so that a recorded pass can be run again under other plans.

    A (ranks, in), B (out, ranks), gates (rows, 1, ranks)      refilled from a plan before the pass, widths rounded up

The places are given out by a layout: the sites where adapters act, and how wide each one's ranks are, rounded up. Plans
of one layout share a pool, whatever adapters they are of. Padding ranks have the gate 0; what stands there is finite.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor

from lora_rt.core.engine.plan import Plan
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.engine.stack import Stack, StackedGroup, StackedSite

_LEAST = 16


def can_be_pooled(plan: Plan | None) -> bool:
    """Whether a plan's work is that of its layout: not with gates per head, a lane per row, DoRA, experts or twins."""
    if plan is None:
        return True
    if not isinstance(plan, SharedPlan) or plan.head_gates or plan.twins:
        return False
    return all(site is None or (site.scales is None and site.b.dim() == 2) for site in plan.stack.sites)


def layout_of(plan: Plan | None) -> Hashable:
    """Equal for plans whose tensors fit into the same places; None is the base alone."""
    if plan is None:
        return None
    assert isinstance(plan, SharedPlan)
    sites = [(n, s.group, s.start, rounded(s.stop - s.start)) for n, s in enumerate(plan.stack.sites) if s is not None]
    order = [site for _, site in sorted(((group, start), (n, group, wide)) for n, group, start, wide in sites)]
    return tuple(order), tuple(number for number, g in plan.stack.groups.items() if g.offset is not None)


def rounded(width: int) -> int:
    """The next power of two: few widths, so few recordings."""
    return max(_LEAST, 1 << (width - 1).bit_length())


class PooledPlan(SharedPlan):
    """The places, and the plan over them.

    Args:
        like: any plan of the layout.
        rows: of the pass; a plan for fewer rows leaves the others without adapters.
    """

    def __init__(self, like: SharedPlan, rows: int) -> None:
        self.topology = like.topology
        self.twins, self.head_gates = {}, {}
        self._weights, self._own = like._weights, None
        sites: list[StackedSite | None] = [None] * len(like.stack.sites)
        groups: dict[int, StackedGroup] = {}
        self.group_gates = {}
        for number, group in like.stack.groups.items():
            width = 0
            for index, site in _sites_of(like.stack, number):
                stop = width + rounded(site.stop - site.start)
                sites[index] = StackedSite(number, width, stop, (site.b.new_zeros(len(site.b), stop - width),), ())
                width = stop
            offset = None if group.offset is None else group.offset.new_zeros(width)
            groups[number] = replace(
                group, rows=(group.a.new_zeros(width, group.a.shape[1]),), pattern=0, offset=offset
            )
            self.group_gates[number] = group.a.new_zeros(rows, 1, width)
        self.stack = Stack(sites, groups, [], like.stack.widest)
        self._filled: SharedPlan | None = None

    def refill(self, plan: SharedPlan, rows: int) -> None:
        """Put the tensors of a plan over (rows, 1 token) into their places; nothing where they are there already."""
        before, self._filled = self._filled, plan
        if before is plan:
            return
        copies: list[tuple[Tensor, Tensor]] = []
        anew = before is None or before.stack is not plan.stack
        if anew:
            torch._foreach_zero_(list(self.group_gates.values()))
        for mine, site in zip(self.stack.sites, plan.stack.sites, strict=True):
            if mine is None or site is None:
                continue
            there, here = slice(site.start, site.stop), slice(mine.start, mine.start + site.stop - site.start)
            gate = plan.group_gates[site.group][..., there]
            copies.append((self.group_gates[site.group][:rows, :, here], gate.expand(rows, 1, -1)))
            if anew:
                copies += self._factors(plan.stack, mine, site, here, there)
        torch._foreach_copy_([place for place, _ in copies], [value for _, value in copies])

    def _factors(
        self, stack: Stack, mine: StackedSite, site: StackedSite, here: slice, there: slice
    ) -> list[tuple[Tensor, Tensor]]:
        own, other = self.stack.groups[site.group], stack.groups[site.group]
        found = [(own.a[here], other.a[there]), (mine.b[:, : site.stop - site.start], site.b)]
        if own.offset is not None and other.offset is not None:
            found.append((own.offset[here], other.offset[there]))
        return found


def _sites_of(stack: Stack, group: int) -> list[tuple[int, StackedSite]]:
    """The sites of a group in the order of their ranks."""
    found = [(index, site) for index, site in enumerate(stack.sites) if site is not None and site.group == group]
    return sorted(found, key=lambda item: item[1].start)
