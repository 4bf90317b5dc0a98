"""A batch that rows join and leave while it runs; every row is what it would be alone.

    batch.add(rows) -> batch.step() -> batch.step() -> ... -> batch.drop(rows)

A step gives every row one more token. Rows that share a pass stand padded on the left (.), so that all end in the last
column. Here `b` joins a running `a`, and `a` ends two steps later; capitals are the tokens that a step reads:

    step 1   a: T H E           `a` is read, and says its first token
    step 2   a: t h e S         one token for `a`; `b` is read in a pass of its own, at its own width
             b: H I
    step 3   a: t h e s E       `b`'s keys and values are padded to the width of `a`'s and stacked under them,
             b: . . h i Y       and one pass serves both
    step 4   b: h i y O         `a` has ended: its row is cut out of the cache, and the padding that only it needed

Sampling settings, seed, answer and whatever a plan depends on belong to the row, and a row's numbers to it alone.

Rows that can't share a pass run in passes of their own: with another set of rope factors, or of another length in a
model that does not ignore padding. A row may be there to be read alone: it joins, is read by the next step, which hands
it the logits of its `wanted` places, and leaves (see `scoring`).

Knows models, plans and tokens; knows nothing of prompts, compositions or files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic

import torch
from torch import Tensor

from lora_rt.core.engine.plan import Plan
from lora_rt.core.forward import caches
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.forward.steps import Seated
from lora_rt.core.generation.choosing import choose
from lora_rt.core.generation.group import Group, united
from lora_rt.core.generation.row import PassInfo, Planner, R, TokenScore, check_lengths
from lora_rt.core.generation.sampling import SamplingError


class Batch(Generic[R]):
    """Rows that are decoded together.

    Args:
        lm: the model.
        planner: makes the plan of every pass.
        end_ids: tokens that end an answer.
        chunk: how many columns of newcomers are read in one step, so that a long prompt does not hold up the others;
            None reads them at once, as rows are anyhow that are only read, are longer than where rope changes, or
            are of a model that can't go on with several tokens.
        deterministic: give every row passes of its own. In few bits the kernels round a batch of another shape
            otherwise; so the text of a row is that of the row alone, bit for bit.
        keep: told of each row that has ended, with a cache of its own that holds what was read of it; but not of one
            that is only read and was padded for others.
    """

    def __init__(
        self,
        lm: CausalLM,
        planner: Planner[R],
        end_ids: Sequence[int] = (),
        *,
        chunk: int | None = None,
        deterministic: bool = False,
        keep: Callable[[R, Any], None] | None = None,
    ) -> None:
        self._lm = lm
        self._planner = planner
        self._end_ids = frozenset(end_ids)
        if chunk is not None and chunk < 1:
            raise SamplingError(f"chunk is {chunk}", next_step="Give a whole number of tokens from 1 on, or None")
        self._chunk = chunk
        self._deterministic = deterministic
        self._keep = keep
        self._groups: list[Group[R]] = []
        self._unread: list[R] = []
        self.rows: list[R] = []

    def add(self, rows: Sequence[R]) -> None:
        """Let rows join; the next step reads them.

        Raises:
            LengthError: a row leaves no room for an answer, or is only read and longer than the context.
            SamplingError: a row has ended, or is in this batch.
        """
        joined = [*self.rows, *rows]
        if len({id(row) for row in joined}) < len(joined) or any(row.ended is not None for row in rows):
            raise SamplingError("a row has ended, or has joined already", next_step="Make a new one with `rows`")
        check_lengths(rows, self._lm.capacity)
        self.rows += rows
        self._unread += rows

    def drop(self, rows: Sequence[R]) -> None:
        """Let rows leave; they cost nothing from now on."""
        gone = {id(row) for row in rows}
        self.rows = [row for row in self.rows if id(row) not in gone]
        self._unread = [row for row in self._unread if id(row) not in gone]
        with torch.inference_mode():
            for group in self._groups:
                group.keep([number for number, row in enumerate(group.rows) if id(row) not in gone])
        self._groups = [group for group in self._groups if group.rows]

    def step(self) -> list[R]:
        """Give every row its next token, the last of its `answer`, or read it where it is only read.

        Returns:
            The rows that have got a token, in the order in which they joined. A row that has ended (see `ended`) has
            left the batch; one that has ended with the end of the turn, without a number or as read has got no token.

        Raises:
            LoraRtError: the runtime was closed.
        """
        with torch.inference_mode():
            try:
                self._regroup()  # 1) who shares a pass
                # 2) one pass per group; (rows, vocab) of those that have been read to their last column and now speak
                ready = [(group, logits) for group in self._groups if (logits := self._pass(group)) is not None]
                self._lm.check_open()
                tokens = self._choose(ready)  # 3) all rows' tokens at once, each by its own settings and seed
            except BaseException:
                self._read_anew()
                raise
            for group, _ in ready:
                group.append([tokens[id(row)] for row in group.rows])
        # 4) what each row makes of its token; who has ended leaves
        got = [row for row in self.rows if self._takes(row, tokens.get(id(row)))]
        if gone := [row for row in self.rows if row.ended is not None]:
            self._tell(gone)
            self.drop(gone)
        return got

    def _read_anew(self) -> None:
        """After a pass that has failed: what others have read is no use, since some have and some have not."""
        self._groups, self._unread = [], list(self.rows)
        for row in self.rows:
            row.read = 0

    def _tell(self, gone: Sequence[R]) -> None:
        """Hand out the caches of rows that have ended."""
        if self._keep is None or self._lm.keeping != "shared":
            return
        ended = {id(row) for row in gone if row.ended != "error"}
        with torch.inference_mode():
            for group in self._groups:
                for number, row in enumerate(group.rows):
                    if row.wanted is not None and row.length < group.width:
                        continue  # padded on the right, which a sliding window keeps in the place of tokens
                    if id(row) in ended and group.cache is not None:
                        one = torch.tensor([number], device=group.ids.device)
                        self._keep(row, caches.joined(self._lm.new_cache(), [(group.cache, one)], row.read))

    def _choose(self, ready: Sequence[tuple[Group[R], Tensor]]) -> dict[int, int | None]:
        """The next token of every row that was read to its end, by the id of the row; None where there is none."""
        if not ready:
            return {}
        rows = [row for group, _ in ready for row in group.rows]
        logits = ready[0][1] if len(ready) == 1 else torch.cat([part for _, part in ready])  # (all rows, vocab)
        forbidden = [self._end_ids if len(row.answer) < row.sampling.min_new_tokens else () for row in rows]
        noted = [(n, row) for n, row in enumerate(rows) if row.likely is not None]
        before = logits[[n for n, _ in noted]].float().log_softmax(-1) if noted else None
        chosen = choose(logits, [row.sampler for row in rows], forbidden)
        for place, (n, row) in enumerate(noted):
            if before is not None and (token := chosen[n]) is not None and token not in self._end_ids:
                row.scores.append(TokenScore.of(before[place], token, row.likely or 0))
        return {id(row): token for row, token in zip(rows, chosen, strict=True)}

    def _takes(self, row: R, token: int | None) -> bool:
        """Note a row's next token and whether that was its last one; whether it has got one at all."""
        if row.wanted is not None:
            row.ended = "read"
            return False
        if row.read < row.length:  # still being read
            return False
        if token is None:
            row.ended = "error"
            return False
        if token in self._end_ids:
            row.ended = "end"
            return False
        row.answer.append(token)
        row.sampler.said(token)
        if row.hear(token):
            row.ended = "stop"
        elif len(row.answer) >= row.sampling.max_new_tokens:
            row.ended = "length"
        elif row.length >= self._lm.capacity:
            row.ended = "context"
        return True

    def _pass(self, group: Group[R]) -> Tensor | None:
        """One pass of a group: its next tokens' logits, (rows, vocab); None where it is not read yet, or only read."""
        end, wanted = self._end(group), group.wanted
        history, mask = group.ids[:, :end], group.mask[:, :end]
        info = PassInfo.of(group.rows, history, mask, group.read)
        plan = self._planner(info, group.rows)
        if wanted is not None:
            group.hand_out(self._read(group, info, plan, wanted), wanted)
        else:
            logits = self._forward(group, info, plan)
        group.read = end if group.cache is not None else 0
        for row in group.rows:
            row.read = max(0, row.length - (group.width - end))
        return logits[:, -1] if wanted is None and end == group.width else None

    def _end(self, group: Group[R]) -> int:
        """The column up to which the next pass of a group reads."""
        if self._chunk is None or group.cache is None or group.wanted is not None:
            return group.width
        end, rope = group.read + self._chunk, self._lm.rope
        # What is read by itself must have the rope factors of the whole, and the model has to go on from there.
        if end < group.width and rope.factors(1) == rope.factors(group.width) and self._lm.reads_in_parts:
            return end
        return group.width

    def _read(self, group: Group[R], info: PassInfo, plan: Plan | None, wanted: range) -> Tensor:
        """The logits of some columns, (rows, wanted, vocab), of a group that is only read."""
        places = range(wanted.start - group.read, wanted.stop - group.read)  # within this pass
        keep = None if len(places) == info.ids.shape[1] else torch.tensor([*places], device=info.ids.device)
        return self._lm.forward(info.ids, info.mask, info.positions, plan=plan, cache=group.cache, keep=keep)

    def _forward(self, group: Group[R], info: PassInfo, plan: Plan | None) -> Tensor:
        """The logits of a pass over the group's cache, (rows, 1, vocab): by a recorded step where there are such."""
        steps = None if self._alone else self._lm.steps
        if steps is not None and group.cache is not None and group.read and info.ids.shape[1] == 1:
            coming = max(row.sampling.max_new_tokens - len(row.answer) for row in group.rows)
            done = steps.advance(info.ids, info.mask, info.positions, plan, group.cache, coming)
            if done is not None:
                logits, group.cache = done
                return logits[:, None]
        if isinstance(group.cache, Seated):
            everybody = torch.arange(len(group.rows), device=group.ids.device)
            group.cache = caches.joined(self._lm.new_cache(), [(group.cache, everybody)], group.read)
        return self._lm.forward(
            info.ids, info.mask, info.positions, plan=plan, cache=group.cache, keep=1, padded=group.padded
        )

    def _regroup(self) -> None:
        """Read newcomers in groups of their own, and unite groups that have been read and may share passes."""
        for group in self._groups:
            if group.read and any(self._outgrown(row) for row in group.rows):
                stay = [n for n, row in enumerate(group.rows) if not self._outgrown(row)]
                self._unread += [row for row in group.rows if self._outgrown(row)]
                group.keep(stay)
        groups = [part for group in self._groups if group.rows for part in self._parted(group)]
        alike: dict[Hashable, list[Group[R]]] = {}
        for group in groups:
            reading = group.cache is not None and group.read < group.width - 1
            alike.setdefault((id(group) if reading else None, self._share(group.rows[0])), []).append(group)
        self._groups = [united(self._lm, same) for same in alike.values()]
        newcomers: dict[Hashable, list[R]] = {}
        for row in self._unread:
            newcomers.setdefault(self._begins(row), []).append(row)
        for rows in newcomers.values():
            caching = rows[0].wanted is None or self._keep is not None
            self._groups.append(Group.begun(self._lm, rows, caching=caching))
        self._unread = []

    def _outgrown(self, row: R) -> bool:
        return self._lm.rope.reread(row.read, row.length)

    def _parted(self, group: Group[R]) -> list[Group[R]]:
        """The group, or its parts where its rows have got different rope factors by growing."""
        if not self._lm.rope.varies:
            return [group]
        parts: dict[Hashable, list[int]] = {}
        for number, row in enumerate(group.rows):
            parts.setdefault(self._share(row), []).append(number)
        return [group] if len(parts) == 1 else [group.part(numbers) for numbers in parts.values()]

    def _begins(self, row: R) -> Hashable:
        """Equal for newcomers that may be read in one pass."""
        if row.wanted is not None and not self._deterministic:
            begin = None if row.begin is None else id(row.begin[0])
            return "read", row.company, self._lm.rope.factors(row.length), begin
        return self._share(row) if row.wanted is None and row.begin is None else id(row)

    @property
    def _alone(self) -> bool:
        """Whether each row that speaks has passes of its own; rows that are only read need no trial of a cache."""
        return self._deterministic or self._lm.keeping == "apart"

    def _share(self, row: R) -> Hashable:
        """Equal for rows that may share a pass."""
        if self._alone:
            return id(row)
        return row.company, self._fits(row)

    def _fits(self, row: R) -> Hashable:
        """The same, of rows that are under one plan."""
        if len(self.rows) == 1:
            return None  # there is nothing to share, and no need to ask the model whether it minds padding
        if not self._lm.rope.varies and len({one.length for one in self.rows}) == 1:
            return None
        return self._lm.share(row.length)
