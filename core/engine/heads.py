"""Where attention heads lie on a layer, found by what reaches what.

A layer that makes queries, keys or values is disturbed one block of features at a time, each block in a row of its own:

    row 0   the layer as it is            row 1   noise on features 0..15          row 2   noise on features 16..31 ...

and what changes in the input of the attention's output projection says whose block it was: a query's reaches one head,
a key's or a value's the heads of its group. So a fused projection needs no name: [q | k | v], [q k v] of each head and
grouped queries are told apart. The pass ends at that projection, so that of most models the first block alone is run.

Worked example: 4 query heads of 16 features share 2 heads of keys and values, in one fused layer of (4 + 2 + 2) * 16
= 128 features, 8 blocks. Noise on blocks 0 to 3 reaches one head each; on block 4 (keys) heads 0 and 1, on block 5
heads 2 and 3, on 6 and 7 (values) likewise. So `index` is 0 1 2 3 4 5 4 5, sixteen times each, `pool` is 2, and numbers
4 and 5 stand for the means of the gates of heads 0, 1 and of heads 2, 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_rt.core.base.reading import UNREADABLE as UNRUNNABLE
from lora_rt.core.base.roles import ATTENTION, anywhere, roles_of
from lora_rt.core.base.shape import ForwardPass, device_of, heads_of, vocabulary_of

Side = Literal["output", "input"]

_TOKENS = 3
_NOISE = 0.5  # times the spread of the layer's output
_SEEN = 0.05  # of a block's largest change: less is rounding
_probing: ContextVar[bool] = ContextVar("lora_rt_heads", default=False)


@dataclass(frozen=True, slots=True)
class HeadAxis:
    """Where attention heads lie on a layer: `index[f]` is the head of feature f on its output or input side.

    Numbers from the number of query heads on are groups: of keys and values, each of which stands for the mean of
    `pool` query heads.
    """

    side: Side
    index: Tensor  # (features,) int64
    pool: int = 1

    def spread(self, heads: Tensor) -> Tensor:
        """A gate (..., heads) over the features."""
        if self.pool > 1:  # (..., heads) -> (..., heads + groups)
            heads = torch.cat([heads, heads.reshape(*heads.shape[:-1], -1, self.pool).mean(-1)], dim=-1)
        return heads[..., self.index.to(heads.device)]

    def gathered(self, values: Tensor, heads: int) -> Tensor:
        """The sums over each head's features, (heads,), of values (features,); a group's count for all its heads."""
        sums = values.new_zeros(heads + (heads // self.pool if self.pool > 1 else 0)).index_add_(
            0, self.index.to(values.device), values
        )
        groups = sums[heads:].repeat_interleave(self.pool)
        return sums[:heads] + (groups if self.pool > 1 else 0)


class Reached(BaseException):
    """Ends a pass from within; no `Exception`, so that no model's own code catches it."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def find_heads(
    model: Any, layers: Mapping[str, nn.Module], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, HeadAxis]:
    """The head axis of each attention projection that has one; of blocks that are alike one is tried.

    Args:
        layers, sizes: name -> linear layer, and its (out, in).
    """
    count = heads_of(model.config).queries
    families: dict[tuple[Any, ...], list[tuple[str, list[str]]]] = {}
    for out in (name for name in layers if roles_of(name) == ("output",)):
        parent = _attention_of(out)
        inner = [n for n in layers if n.startswith(f"{parent}.") and set(roles_of(n)) & {"query", "key", "value"}]
        if inner and count > 1 and sizes[out][1] % count == 0:
            # Names without numbers, and sizes: a model whose blocks differ has several kinds.
            kind = tuple((anywhere(n), sizes[n]) for n in (out, *inner))
            families.setdefault(kind, []).append((out, inner))
    found: dict[str, HeadAxis] = {}
    for members in families.values():
        out, inner = members[0]
        axes = [_tried(model, layers[n], sizes[n][0], layers[out], count, sizes[out][1] // count) for n in inner]
        if all(axis is None for axis in axes):
            continue
        device = device_of(model)
        ends = HeadAxis("input", torch.arange(count, device=device).repeat_interleave(sizes[out][1] // count))
        for other, names in members:
            found[other] = ends
            found |= {name: axis for name, axis in zip(names, axes, strict=True) if axis is not None}
    return found


def _attention_of(out: str) -> str:
    """The module that both the output projection and those before it lie in."""
    parts = out.split(".")
    last = max((i for i, part in enumerate(parts) if ATTENTION.search(part)), default=None)
    return ".".join(parts[: last + 1] if last is not None else parts[:-1])


def _tried(model: Any, layer: nn.Module, features: int, out: nn.Module, heads: int, size: int) -> HeadAxis | None:
    """The head axis of a layer that makes queries, keys or values; None where what a block reaches makes no sense."""
    # Blocks as wide as a head of the output; a latent attention's queries are wider than what it puts out.
    blocks = features // size if features % size == 0 else heads if features % heads == 0 else 0
    if not blocks:
        return None
    reached = _reached(model, layer, blocks, out)
    if reached is None:
        return None
    # (blocks, tokens, heads * size) -> (blocks, heads): the largest change over tokens and a head's features
    changes = (reached[1:] - reached[:1]).abs().amax(1).reshape(-1, heads, size).amax(-1)
    owners = [_owner(change, number, blocks) for number, change in enumerate(changes)]
    pools = {pool for _, pool in owners} - {1}
    if 0 in pools or len(pools) > 1:  # a block that reaches no heads of its own, or groups of two sizes
        return None
    numbers = [first if pool == 1 else heads + first // pool for first, pool in owners]
    index = torch.tensor(numbers, device=reached.device).repeat_interleave(features // blocks)
    return HeadAxis("output", index, pools.pop() if pools else 1)


def _owner(change: Tensor, block: int, blocks: int) -> tuple[int, int]:
    """The first of the heads that a block reaches, and how many there are; 0 where that makes no sense."""
    heads = len(change)
    hit = (change > _SEEN * change.max()).nonzero().flatten().tolist() if change.max() > 0 else []
    count = len(hit)
    if hit and hit == list(range(hit[0], hit[0] + count)) and hit[0] % count == 0 and heads % count == 0:
        return hit[0], count
    # A norm over all heads lets each reach all others a little: its own is still the one that it reaches most.
    if hit and heads % blocks == 0 and int(change.argmax()) // (heads // blocks) == block:
        return block * (heads // blocks), heads // blocks
    return 0, 0


def _reached(model: Any, layer: nn.Module, blocks: int, out: nn.Module) -> Tensor | None:
    """What the output projection gets, (1 + blocks, tokens, n) float32: undisturbed, and with noise on each block."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        if not _probing.get():  # a pass of another thread
            return y
        width = y.shape[-1] // blocks
        changed = y.clone().view(1 + blocks, -1, y.shape[-1])
        # Other noise for each token: the same on all keys would change no attention.
        noise = torch.randn(changed.shape[1:], generator=generator).to(y) * (y.float().std().to(y) * _NOISE)
        for block in range(blocks):
            place = slice(block * width, (block + 1) * width)
            changed[1 + block, :, place] += noise[:, place]
        return changed.view_as(y)

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if _probing.get():
            raise Reached(args[0])

    # Before hooks of others, which may not expect so many rows.
    handles = [
        layer.register_forward_hook(disturb, prepend=True),
        out.register_forward_pre_hook(stop, prepend=True),
    ]
    ids = (torch.arange(_TOKENS, device=device_of(model)) + 1).remainder(vocabulary_of(model.config))
    token = _probing.set(True)
    try:
        with torch.no_grad():
            model(**ForwardPass.of(model).arguments(ids.repeat(1 + blocks, 1)))
    except Reached as reached:
        x = reached.x.detach().float()
        return x.reshape(1 + blocks, -1, x.shape[-1]) if x.numel() % (1 + blocks) == 0 else None
    except UNRUNNABLE:
        return None
    finally:
        _probing.reset(token)
        for handle in handles:
            handle.remove()
    return None
