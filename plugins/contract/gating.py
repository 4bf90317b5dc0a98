"""Inference: the gate of one resident adapter for one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_rt.plugins.contract.facts import AdapterView, SceneType

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gate:
    """Multipliers of one adapter's contribution; 1 is "as weighted", 0 is "off", 2 is "twice".

    `ranks` broadcasts to (layers, batch, tokens, rank): the gate on the rank axis. A last axis longer than 1 is only
    allowed where all of the adapter's modules have that rank (`GateContext.uniform_rank`). Modules outside the numbered
    layers (an lm_head) take the mean over layers.

    `heads` broadcasts to (layers, batch, tokens, heads): it multiplies the output heads of q/k/v (a key/value head
    takes the mean of its query heads) and the input heads of the attention's output projection; other modules ignore
    it.

    Either may be None, which is "always 1" and costs nothing.

    The tensors lie on the device of `input_ids`, are real and finite (rows that are not active may hold anything);
    float64 and integers become float32. Axes are counted from the last, as in any broadcast: a gate per token has the
    shape (tokens, 1), one per row and token (batch, tokens, 1).
    """

    ranks: Tensor | None = None
    heads: Tensor | None = None


def _no_history() -> tuple[Tensor, Tensor]:
    raise NotImplementedError("whoever made this context knows no tokens before this pass")


@dataclass(frozen=True, slots=True)
class GateContext(AdapterView):
    """What a gate may depend on. Called once per forward pass, not per layer; nothing in here may be changed.

    `rank` is the largest among the adapter's modules, `uniform_rank` says whether they all have it.
    `input_ids` and `positions` are (batch, tokens) of this pass alone (with a KV cache: the new tokens); `positions`
    counts from each row's first real token. `prompt_lengths` is (batch,): tokens from there on were generated.
    `active[row]` is False for rows whose composition does not use this adapter: what is returned for them is ignored.
    `weights[row]` is this adapter's weight there, with which the engine multiplies its contribution and the gate.
    `scene_types[row]` is what the caller gave or a classifier recognized. `prompts[row]` is the user message, or None
    for a chat and for bare token ids. `hidden()` gives the base's early hidden state of this pass, (batch, tokens,
    hidden), with no adapter applied; it is computed when first called. `history()` gives that of all tokens so far,
    (batch, all tokens, hidden), of which this pass's are the last, and a mask (batch, all tokens) that is 0 on padding.
    """

    rank: int
    input_ids: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    active: Sequence[bool]
    scene_types: Sequence[SceneType]
    hidden: Callable[[], Tensor]
    uniform_rank: bool = True
    prompts: Sequence[str | None] = ()
    weights: Sequence[float] = ()
    history: Callable[[], tuple[Tensor, Tensor]] = _no_history


@dataclass(frozen=True, slots=True)
class JointGateContext:
    """All adapters of one mode that act in one forward pass, in the order in which the rows name them.

    A softmax over adapters, for instance, is over `adapters`, in each row over those that are `active` there. All of
    them see the same tokens.

    Where a named composition has a mode (see `Mixture`), `composition` is its name, card and state, and `adapters` are
    its adapters in its order, whatever modes they have themselves. Its card has the `weights` that it was fitted
    around, which the gates multiply, its `scene_types`, `hidden_layers`, and what the mode put there.
    """

    adapters: Sequence[GateContext]
    composition: AdapterView | None = None
