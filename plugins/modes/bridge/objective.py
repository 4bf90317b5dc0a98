"""What a bridge is trained on: every pair in both directions, told apart by the prompt (see `directions`).

Only the answer's tokens carry loss, averaged over all tokens of both directions. From some of the pairs the scene is
also learned without its text: that is the prior which the PMI score subtracts.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_rt.plugins.contract import IGNORE, Encoded, Example, Objective, ObjectiveContext
from lora_rt.plugins.modes.bridge.directions import DIRECTIONS, RESERVE, Direction, prompt_for


@dataclass(frozen=True)
class Options:
    """The options of a bridge.

    The defaults are what did best in pilots on the default base: loss on the prompt cost the forward direction 0.56
    nats per token, a double weight on compressing 0.17, and averaging per example instead of per token 0.08 to 0.13. A
    quarter of the ranks reserved to each direction made no difference that could be told (188 pairs, one epoch: keyword
    F1 0.37 both ways, scene -> text 4.21 nats against 4.23), so none are.

    `expand_weight`, `compress_weight`: loss of a token of that direction; 0 leaves the direction out altogether.
    `prompt_loss`: loss of a prompt's token, as a share of an answer's; 0 is none.
    `reserve`: share of the ranks that is each direction's own, from 0 to 0.5.
    `prior`: share of the pairs from which the scene is learned without its text, too.
    `cycle_weight`: loss of a token of lines that name one direction, such as those of `lora-rt bridge cycle`.
    """

    expand_weight: float = 1.0
    compress_weight: float = 1.0
    prompt_loss: float = 0.0
    reserve: float = 0.0
    prior: float = 0.25
    cycle_weight: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name.replace('_', '-')} is {value:g}; it must be from 0 to {most:g}"
            for name, value, most in (
                ("expand_weight", self.expand_weight, 100.0),
                ("compress_weight", self.compress_weight, 100.0),
                ("prompt_loss", self.prompt_loss, 1.0),
                ("reserve", self.reserve, 0.5),
                ("prior", self.prior, 1.0),
                ("cycle_weight", self.cycle_weight, 100.0),
            )
            if not 0 <= value <= most
        ]
        if not (self.expand_weight or self.compress_weight):
            problems.append("expand-weight and compress-weight are both 0: nothing would be trained")
        if problems:
            raise ValueError("; ".join(problems))

    def weight(self, direction: Direction) -> float:
        """The loss of an answer's token in that direction."""
        return self.expand_weight if direction == "expand" else self.compress_weight

    @property
    def plain(self) -> bool:
        """Whether all labelled tokens weigh the same: the runtime's own loss is then the right one, and faster."""
        weights = {self.weight(d) for d in DIRECTIONS} - {0.0}
        return len(weights) == 1 and not self.prompt_loss and self.cycle_weight == 1.0


class Both(Objective):
    """Cross entropy of texts given scenes, and of scenes given texts.

    A line may have "direction": "expand" or "compress"; it is then trained on in that direction alone.
    """

    fields = ("scene", "text")

    def __init__(self, context: ObjectiveContext, options: Options) -> None:
        self.context = context
        self.options = options
        self.state = _reserved(options.reserve) if options.reserve else None

    def check(self, example: Example) -> list[str]:
        """A direction, where one is named, is one of the two."""
        named = example.get("direction")
        return (
            []
            if named in (None, *DIRECTIONS)
            else [f'"direction" is {named!r}, not {" or ".join(get_args(Direction))}']
        )

    def encode(self, example: Example) -> list[Encoded]:
        """One sequence per direction, and for a share of the pairs one of the scene alone."""
        named = example.get("direction")
        wanted = [d for d in DIRECTIONS if self.options.weight(d) and named in (None, d)]
        content = {"expand": (example["scene"], example["text"]), "compress": (example["text"], example["scene"])}
        sequences = [self._sequence(d, *content[d], cycle=named is not None) for d in wanted]
        if named is None and "compress" in wanted and _drawn(example["text"], self.options.prior):
            sequences.append(self._sequence("compress", "", example["scene"], cycle=False))
        return sequences

    def ranks(self, extra: Mapping[str, Tensor], rank: int) -> Tensor | None:
        """0 on the ranks that are the other direction's own, 1 elsewhere; (batch, rank)."""
        if not self.options.reserve:
            return None
        directions = extra["direction"].long()
        return masks(self.options.reserve, rank).to(directions.device)[directions]

    def _sequence(self, direction: Direction, given: str, wanted: str, *, cycle: bool) -> Encoded:
        prompt = self.context.prompt_ids(prompt_for(direction, given))
        answer = self.context.answer_ids(wanted)
        weight = self.options.weight(direction) * (self.options.cycle_weight if cycle else 1.0)
        return Encoded(
            input_ids=[*prompt, *answer],
            labels=(prompt if self.options.prompt_loss else [IGNORE] * len(prompt)) + answer,
            extra={"direction": DIRECTIONS.index(direction), "start": len(prompt), "weight": weight},
        )


class Weighted(Both):
    """The same, where not all labelled tokens weigh the same."""

    def loss(self, logits: Tensor, labels: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean over all labelled tokens of the batch; nothing is averaged per example first."""
        targets = labels[:, 1:]
        losses = cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
        ).view(targets.shape)
        places = torch.arange(1, labels.shape[1], device=labels.device)
        answered = places >= extra["start"][:, None]
        weights = torch.where(answered, 1.0, self.options.prompt_loss) * extra["weight"][:, None] * (targets != IGNORE)
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9)


def masks(reserve: float, rank: int) -> Tensor:
    """One row per direction, (2, rank): the first ranks are expanding's own, the last ones compressing's."""
    own = min(max(1, round(reserve * rank)), rank // 2)
    masks = torch.ones(len(DIRECTIONS), rank)
    masks[0, rank - own :] = 0.0
    masks[1, :own] = 0.0
    return masks


def _reserved(share: float) -> nn.Module:
    """The state of the mode: the share, so that the gate of a finished adapter is the one it was trained under."""
    state = nn.Module()
    state.register_buffer(RESERVE, torch.tensor(share))
    return state


def _drawn(text: str, share: float) -> bool:
    """Whether this pair is among the share, decided by its own text: the same in every run, whatever stands around."""
    return zlib.crc32(text.encode()) < share * 2**32
