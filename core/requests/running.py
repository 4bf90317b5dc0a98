"""A row of a running batch, from its composition to its text; its composition can be changed while it runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

from lora_rt.core.generation.row import DecodingRow, TokenScore
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.generation.stopping import SpokenText
from lora_rt.core.requests.composition import Composition, CompositionLike
from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.timeline import Timeline

Weigh = Callable[[Composition | None], Row]


class RequestRow(DecodingRow):
    """A row of tokens and what it is under.

    Args:
        ids, sampling, seed, prompt_length: as of `DecodingRow`.
        timeline: what it is under at each token.
        weigh: makes what it is under of another composition.
        spoken: follows its text; None where only tokens are wanted.
    """

    def __init__(
        self,
        ids: Sequence[int],
        timeline: Timeline,
        weigh: Weigh,
        *,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prompt_length: int | None = None,
        spoken: SpokenText | None = None,
    ) -> None:
        super().__init__(ids, sampling, seed, prompt_length)
        self.timeline = timeline
        self._weigh = weigh
        self._spoken = spoken
        self._text: list[str] = []
        self._taken = 0
        self._told = 0  # scores
        self._out = 0  # tokens whose text was given out

    def compose(self, composition: CompositionLike | None) -> None:
        """Put the row under another composition, from its next token on.

        What was read and said so far stays as it was computed: keys and values are kept.

        Raises:
            LoraRtError: the composition can't be used; the row then goes on as it was.
        """
        self.turn(self.weighed(composition))

    def weighed(self, composition: CompositionLike | None) -> Row:
        """What another composition would put it under: resolved and loaded, and not yet in force.

        Raises:
            LoraRtError: the composition can't be used.
        """
        return self._weigh(Composition.of(composition))

    def turn(self, row: Row) -> None:
        """Put it under something else, from its next token on."""
        self.timeline.turn(self.read, row)

    @property
    def company(self) -> Hashable:
        """What it is under, where one of its adapters acts on a layer that is not told which rows it gets."""
        return self.timeline.company

    def hear(self, token: int) -> bool:
        """Follows the text of the answer; true where a stop text is complete."""
        if self._spoken is None:
            return False
        self._text.append(self._spoken.push(token))
        return self._spoken.stopped

    def new_text(self) -> str:
        """The text since this was last asked; with what was held back once the row has ended."""
        if self._spoken is not None:
            if self.ended is not None:
                self._text.append(self._spoken.rest())
            self._out = self._spoken.tokens
            if self.ended is not None:
                self._spoken = None
        found = "".join(self._text[self._taken :])
        self._taken = len(self._text)
        return found

    def new_scores(self) -> Sequence[TokenScore]:
        """The scores, since this was last asked, of the tokens whose text `new_text` has given."""
        found, self._told = self.scores[self._told : self._out], self._out
        return found


class RowStream(Iterator[str]):
    """The pieces of one answer as they are decoded; its composition can be changed between two of them.

    Args:
        row: whose text it is.
        steps: a generator that decodes; each of its items is a step.
    """

    def __init__(self, row: RequestRow, steps: Iterator[list[int | None]]) -> None:
        self._row = row
        self._steps = steps

    def compose(self, composition: CompositionLike | None) -> None:
        """Go on under another composition from the next token on; what was read and said stays as it was computed.

        Raises:
            LoraRtError: it can't be used; the stream then goes on as it was.
        """
        self._row.compose(composition)

    @property
    def unheard(self) -> list[str]:
        """The texts that adapters wait for and that have not appeared so far."""
        return self._row.timeline.unheard

    def __next__(self) -> str:
        for _ in self._steps:
            if piece := self._row.new_text():
                return piece
        if piece := self._row.new_text():
            return piece
        raise StopIteration

    def close(self) -> None:
        """Stop decoding."""
        self._steps.close()  # type: ignore[attr-defined]  # a generator
