"""Training: how an example becomes tokens and labels, what the loss is, and what is trained beside the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_rt.plugins.contract.facts import BaseFacts

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORE = -100
"""The label of a token that carries no loss."""

Example = Mapping[str, Any]
"""One line of the training data, e.g. {"scene": ..., "text": ...}."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training sequence.

    `labels[i]` is the token that position i itself holds, or `IGNORE` (the shift by one is the loss's business, as
    everywhere in transformers). `extra` travels unchanged to `Objective.loss`, e.g. the direction of a bridge pair.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    extra: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError(f"{len(self.input_ids)} tokens but {len(self.labels)} labels")


@dataclass(frozen=True, slots=True)
class ObjectiveContext:
    """What a mode needs to turn examples into tokens.

    `prompt_ids(prompt)` renders one user message, or a list of chat messages, through the base's chat template, up to
    and including the opening of the answer; where the base has no template, the text as it is. `answer_ids(text)` are
    the tokens of an answer with the end of the turn behind it, and `turn_end` are those of that end alone: what the
    chat template writes behind an answer, or the tokenizer's end of text. Special tokens in a text are text. `options`
    are the mode's own options, as given to `train`, and `scene_types` those that the adapter is to know
    (`--scene-types`).
    """

    register: str
    base: BaseFacts
    seed: int
    options: Mapping[str, str]
    prompt_ids: Callable[[Any], list[int]]
    answer_ids: Callable[[str], list[int]]
    scene_types: Sequence[str] = ()
    turn_end: Sequence[int] = ()


class Objective:
    """What one training run optimises. A mode returns a subclass's instance from `lora_rt_objective`.

    `fields` are the keys that every data line must have, all of them non-empty strings; where "scene" and "text" are
    among them, lines in the usual forms of others (messages, instruction and output) are read into these two. With
    `chats`, "scene" may be a list of chat messages, which `prompt_ids` takes as well. A module that names
    its fields as `LORA_RT_FIELDS`, too, has bad lines refused before a base is loaded. `state` is trained beside the
    adapter and saved as `mode.safetensors`; None where the mode keeps nothing of its own. `hidden_layers` is after how
    many of the base's blocks `lora_rt_gate` and `lora_rt_scene` are to see the early hidden state; it is kept in the
    card (0: what the first block is given; None: a quarter of the blocks).
    """

    fields: tuple[str, ...] = ("scene", "text")
    chats: bool = False
    state: nn.Module | None = None
    hidden_layers: int | None = None

    def check(self, example: Example) -> list[str]:
        """Everything that is wrong with one data line beyond missing fields; an empty list if it is good."""
        return []

    def encode(self, example: Example) -> list[Encoded]:
        """The training sequences of one example (a bridge makes two of a pair)."""
        raise NotImplementedError("this objective does not say what is trained on of an example")

    def loss(self, logits: Tensor, labels: Tensor, extra: Mapping[str, Tensor]) -> Tensor | None:
        """The scalar loss of a batch, or None for the mean cross entropy per labelled token.

        logits (batch, tokens, vocab), labels (batch, tokens) unshifted, `extra` one (batch,) tensor per key.
        """
        return None

    def ranks(self, extra: Mapping[str, Tensor], rank: int) -> Tensor | None:
        """The gate on the adapter's ranks while it trains, or None for "always 1"; the twin of `lora_rt_gate`.

        Returns (batch, rank), on the device of the tensors in `extra`, which are as in `loss`.
        """
        return None


class SceneToText(Objective):
    """Cross entropy of the text's tokens, given the scene: what most modes train.

    Args:
        context: of the run.
        state: what is kept beside the adapter, where the mode keeps something.
    """

    chats = True

    def __init__(self, context: ObjectiveContext, state: nn.Module | None = None) -> None:
        self.context = context
        self.state = state

    def encode(self, example: Example) -> list[Encoded]:
        """One sequence: prompt(scene) + text, loss on the text alone."""
        prompt = self.context.prompt_ids(example["scene"])
        answer = self.context.answer_ids(example["text"])
        return [Encoded(input_ids=[*prompt, *answer], labels=[IGNORE] * len(prompt) + answer)]
