"""What the filter computes from its state: gates and scales as mixtures over scene types, and the types themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.plugins.contract import AdapterView, BaseFacts, Gate, LoraRtError, ScenePrediction, SceneType


def untrained(types: int, base: BaseFacts, adapters: int, *, heads: bool) -> nn.Module:
    """Zeros throughout, as buffers of the state's names: of an adapter, or of a composition of so many."""
    state = nn.Module()
    for name, allowed in _shapes(types, base, adapters).items():
        state.register_buffer(name, torch.zeros(allowed[0] if heads else allowed[-1]))
    return state


def _shapes(types: int, base: BaseFacts, adapters: int) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each tensor of the state may have, the one with a factor per head first."""
    each = (adapters,) if adapters else ()
    return {
        "theta": [(*each, types, base.layers, base.heads), (*each, types, base.layers, 1)],
        "scale": [(*each, types)],
        "registrar": [(types + 1, base.hidden_size + 1)],
    }


class Filter:
    """The state of one adapter, or of a composition, that knows the scene types `names`, of which neutral is the last.

    Its methods raise LoraRtError where a tensor of the state has another shape than scene types and base give it, and
    where a row has a scene type that is not among them.
    """

    def __init__(self, view: AdapterView, names: Sequence[str]) -> None:
        self._view = view
        self._names = names

    @property
    def acts(self) -> bool:
        """Whether anything was fitted but the classifier."""
        return any((tensor := self._read(name)) is not None and bool(tensor.any()) for name in ("theta", "scale"))

    def gate(self, kinds: Sequence[SceneType], device: torch.device) -> Gate | None:
        """The gate of an adapter for rows of these scene types."""
        theta = self._read("theta")
        if theta is None or not (torch.is_grad_enabled() or bool(theta.any())):
            return None
        theta = theta.to(device)
        shares = self._shares(kinds).to(theta)
        # (rows, types) x (types, layers, heads) -> (layers, rows, heads); what is none of the types keeps a gate of 1.
        mixed = torch.einsum("rt,tlh->lrh", shares[:, :-1], 2 * theta.sigmoid()) + shares[:, -1, None]
        gate = mixed[:, :, None, :]
        return Gate(heads=gate) if gate.shape[-1] > 1 else Gate(ranks=gate)

    def gates(self, kinds: Sequence[SceneType], device: torch.device) -> list[Gate | None] | None:
        """The gates of the adapters of a composition, likewise."""
        theta, scale = self._read("theta"), self._read("scale")
        if theta is None or scale is None:
            return None
        theta, scale = theta.to(device), scale.to(device)
        shares = self._shares(kinds).to(theta)
        rest = shares[:, -1]
        # (rows, types) x (adapters, types, layers, heads) -> (adapters, layers, rows, heads)
        heads = torch.einsum("rt,ktlh->klrh", shares[:, :-1], 2 * theta.sigmoid()) + rest[:, None]
        ranks = torch.einsum("rt,kt->kr", shares[:, :-1], scale.exp()) + rest
        return [Gate(ranks=r[None, :, None, None], heads=h[:, :, None, :]) for r, h in zip(ranks, heads, strict=True)]

    def prediction(self, hidden: Tensor, mask: Tensor) -> ScenePrediction | None:
        """The softmax of a linear map of the prompt's mean early hidden state.

        Each token's state is brought to length 1 first: a few tokens of a prompt have states a thousand times the
        others'.
        """
        classifier = self._read("registrar")
        if classifier is None:
            return None
        directions = nn.functional.normalize(hidden.float(), dim=-1)
        real = mask[..., None].float()
        mean = (directions * real).sum(1) / real.sum(1).clamp(min=1)
        weights = classifier.to(mean)
        scores = mean @ weights[:, :-1].T + weights[:, -1]
        return ScenePrediction(list(self._names), scores.softmax(-1))

    def scaled(self, weight: float, kind: SceneType) -> Any:
        """A weight times the scale of a scene type: a tensor where gradients lead to the scale."""
        scale = self._read("scale")
        if scale is None or not (torch.is_grad_enabled() or bool(scale.any())):
            return weight
        shares = self._shares([kind]).to(scale)[0]
        return weight * (shares[:-1] @ scale.exp() + shares[-1])

    def _read(self, name: str) -> Tensor | None:
        view = self._view
        tensor = view.state.get(name)
        if tensor is None:
            return None
        allowed = _shapes(len(self._names) - 1, view.base, len(view.card.get("weights", ())))[name]
        if tuple(tensor.shape) not in allowed:
            raise LoraRtError(
                f"{name!r} in the state of {view.adapter!r} has the shape {tuple(tensor.shape)}, not {allowed[0]}",
                next_step="Fit it again with: lora-rt tune --per scene",
            )
        return tensor

    def _shares(self, kinds: Sequence[SceneType]) -> Tensor:
        """(rows, types + 1), each row adding up to 1; the last column is neutral's, as is a row without a type."""
        rows = [self._distribution(kind) for kind in kinds]
        strange = sorted({name for row in rows for name in row} - set(self._names))
        if strange:
            raise LoraRtError(
                f"the adapter {self._view.adapter!r} does not know the scene type {strange[0]!r}",
                next_step=f"Use one of: {', '.join(self._names)}",
            )
        return torch.tensor([[row.get(name, 0.0) for name in self._names] for row in rows])

    def _distribution(self, kind: SceneType) -> Mapping[str, float]:
        if kind is None:
            return {self._names[-1]: 1.0}
        return {kind: 1.0} if isinstance(kind, str) else kind
