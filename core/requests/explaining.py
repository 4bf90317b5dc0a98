"""Which register acted where: the size of each adapter's contribution in every layer, head and token of one pass.

The pass is run under its real plan. Beside it, every layer is asked once more for each adapter alone, with the same
weight and gate: what it adds is its contribution. Sizes are relative to the base's own output of the same layers:

    share[adapter, layer, token] = |sum of what it adds| / |what the base gives|       (norms over features and sites)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.shape import heads_of
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.heads import HeadAxis
from lora_rt.core.engine.plan import Plan
from lora_rt.core.engine.topology import Site
from lora_rt.core.generation.row import PassInfo
from lora_rt.core.requests.planner import RowPlanner
from lora_rt.core.requests.running import RequestRow
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, SceneType


@dataclass(frozen=True, slots=True)
class Explanation:
    """Relative sizes of what each adapter added, 0 where it did nothing.

    `layers` (adapters, layers); `heads` (adapters, layers, heads) of the attention's q, k and v; `tokens` (adapters,
    tokens), for `ids` (tokens,). `factors` (adapters, layers, heads) are weight times gate, averaged over the tokens,
    and `weights` (adapters, tokens) the same averaged over layers and heads.
    `scene_type` is the one that the gates saw at the start.
    """

    names: list[str]
    ids: list[int]
    scene_type: SceneType
    layers: Tensor
    heads: Tensor
    tokens: Tensor
    factors: Tensor
    weights: Tensor

    @property
    def moving(self) -> bool:
        """Whether the weights differ between the tokens."""
        return bool((self.weights.amax(-1) - self.weights.amin(-1) > 1e-4).any())

    def document(self, prompt: str, spec: str, answer: str, pieces: Sequence[str]) -> dict[str, Any]:
        """The JSON form: every list is by adapter first. `pieces` are the texts of the tokens."""

        def rounded(values: Any) -> Any:
            return [rounded(v) for v in values] if isinstance(values, list) else round(values, 5)

        return {
            "prompt": prompt,
            "answer": answer,
            "spec": spec,
            "scene_type": self.scene_type,
            "adapters": self.names,
            "tokens": list(pieces),
            "layers": rounded(self.layers.tolist()),
            "heads": rounded(self.heads.tolist()),
            "factors": rounded(self.factors.tolist()),
            "per_token": rounded(self.tokens.tolist()),
            "weight_per_token": rounded(self.weights.tolist()),
        }


def explain(model: Any, bank: AdapterBank, planner: RowPlanner, row: RequestRow) -> Explanation:
    """Run one row and measure what each of its adapters adds.

    Raises:
        LoraRtError: no adapter acts at any token, or what one adds is not a number any more.
    """
    whole = torch.tensor([row.ids], device=bank.device)  # (1, tokens)
    info = PassInfo.of([row], whole, torch.ones_like(whole))
    plan = planner(info, [row])
    alone = planner.alone(info, [row])
    if plan is None or not alone:
        text = "no adapter acts on this text"
        raise LoraRtError(text, next_step="Give a weight other than 0, and a text in which its words appear")
    probe = Probe(
        bank, plan, {name: own for name, (_, own) in alone.items()}, len(row.ids), heads_of(model.config).queries
    )
    probe.run(model, input_ids=whole)
    # (adapters, layers, tokens, heads)
    factors = torch.stack([_factors(gate, probe.depth, len(row.ids), probe.heads) for gate, _ in alone.values()])
    found = probe.explanation(row.ids, row.timeline.row.scene_type, factors)
    if not all(sizes.isfinite().all() for sizes in (found.layers, found.heads, found.tokens, found.weights)):
        raise LoraRtError("what the adapters add is not a number any more", next_step="Use smaller weights")
    return found


def _factors(gate: Gate, layers: int, tokens: int, heads: int) -> Tensor:
    """(layers, tokens, heads): what multiplies the adapter, averaged over ranks."""
    assert gate.ranks is not None
    values = gate.ranks.mean(-1, keepdim=True)  # (layers|1, 1, tokens|1, 1)
    values = values if gate.heads is None else values * gate.heads  # (layers|1, 1, tokens|1, heads|1)
    return values.expand(layers, 1, tokens, heads)[:, 0].float().cpu()


class Probe:
    """Measures one pass over one row. Its hooks see each layer's input and output, and are removed afterwards."""

    def __init__(self, bank: AdapterBank, plan: Plan, alone: Mapping[str, Plan], tokens: int, heads: int) -> None:
        self._bank = bank
        self._plan = plan
        self._alone = {name: own.begin(1, tokens, None) for name, own in alone.items()}
        depth = 1 + max((s.layer for s in bank.topology.sites if s.layer is not None), default=0)
        self.depth, self.heads = depth, heads
        named = {bank.topology.sites[index].name: axis for index, axis in bank.topology.heads.items()}
        self._axes = {name: axis for name, axis in named.items() if axis.side == "output"}
        self._added = torch.zeros(len(alone), depth, tokens)
        self._base = torch.zeros(depth, tokens)
        self._added_heads = torch.zeros(len(alone), depth, heads)
        self._base_heads = torch.zeros(depth, heads)

    def run(self, model: Any, **arguments: Any) -> None:
        """The pass, under its plan."""
        ids = arguments["input_ids"]
        handles = [
            site.module.register_forward_hook(self._hook(index, site))
            for index, site in enumerate(self._bank.topology.sites)
            if site.layer is not None
        ]
        try:
            with torch.inference_mode(), self._plan.running(*ids.shape):
                model(**arguments, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int, site: Site) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._note(index, site, inputs[0], output)

        return hook

    def _note(self, index: int, site: Site, x: Tensor, y: Tensor) -> None:
        assert site.layer is not None
        rest = y.detach().float().clone()  # (1, tokens, out) or (tokens, out)
        for k, own in enumerate(self._alone.values()):
            added = own.add(index, x, torch.zeros_like(y, dtype=torch.float32))  # the shape of y
            rest -= added
            self._added[k, site.layer] += _square(added)  # (tokens,)
            if (axis := self._axes.get(site.name)) is not None:
                self._added_heads[k, site.layer] += self._by_head(axis, added)  # (heads,)
        self._base[site.layer] += _square(rest)
        if (axis := self._axes.get(site.name)) is not None:
            self._base_heads[site.layer] += self._by_head(axis, rest)

    def _by_head(self, axis: HeadAxis, values: Tensor) -> Tensor:
        """The sum of squares of each head, (heads,); a key/value head counts for each of its query heads."""
        return axis.gathered(values.reshape(-1, values.shape[-1]).square().sum(0), self.heads).cpu()

    def explanation(self, ids: list[int], scene_type: SceneType, factors: Tensor) -> Explanation:
        """What the pass showed."""
        floor = 1e-12
        return Explanation(
            names=list(self._alone),
            ids=ids,
            scene_type=scene_type,
            layers=(self._added.sum(-1) / self._base.sum(-1).clamp(min=floor)).sqrt(),  # (adapters, layers)
            heads=(self._added_heads / self._base_heads.clamp(min=floor)).sqrt(),  # (adapters, layers, heads)
            tokens=(self._added.sum(1) / self._base.sum(0).clamp(min=floor)).sqrt(),  # (adapters, tokens)
            factors=factors.mean(2),  # (adapters, layers, heads)
            weights=factors.mean((1, 3)),  # (adapters, tokens)
        )


def _square(values: Tensor) -> Tensor:
    """(1, tokens, n) or (tokens, n) -> (tokens,)"""
    return values.reshape(-1, values.shape[-1]).square().sum(-1).cpu()
