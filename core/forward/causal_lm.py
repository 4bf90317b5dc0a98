"""A causal language model of transformers, as passes over rows need it.

Which arguments its forward takes, how long a row may be, which rows may share a pass, and where keys and values are
kept. Found out here once, so that nothing above depends on an architecture.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DummyLayer

from lora_rt.core.base.shape import ForwardPass, context_of, device_of, heads_of, positions_of, vocabulary_of
from lora_rt.core.base.upstream import keeps_a_state
from lora_rt.core.engine.plan import Plan, base_alone
from lora_rt.core.forward import decoder_trial
from lora_rt.core.forward.decoder import is_watched
from lora_rt.core.forward.decoder_prompt import DecoderPrompt
from lora_rt.core.forward.decoder_step import DecoderStep
from lora_rt.core.forward.decoder_trial import PADDING, PROBE, are_near, is_exact
from lora_rt.core.forward.growing_cache import GrowingLayer, GrowingWindow, let_grow
from lora_rt.core.forward.rope import Rope, forget_growth
from lora_rt.core.forward.steps import Steps, on_cuda
from lora_rt.core.forward.tried import Tried
from lora_rt.errors import LoraRtError

Keeping = Literal["shared", "apart", "none"]
"""Rows may share a cache; each row needs one of its own; or there is none, and every pass reads all tokens again."""

_log = logging.getLogger("lora_rt.engine")

_VARIABLE = "LORA_RT_CUDA_GRAPHS"
CACHES = ("past_key_values", "cache_params")
"""What a model calls its cache, in what it takes and gives."""


class CausalLM:
    """One model. Passes of several threads may run at once, but for models whose rope depends on length."""

    def __init__(self, model: Any, tried: Tried | None = None) -> None:
        """With `tried`, what is found out about the model is remembered."""
        self.model = model
        self.tried = tried or Tried()
        self.device = device_of(model)
        self.capacity = context_of(model.config)
        self.rope = Rope(model.config)
        self._pass = ForwardPass.of(model)
        self._takes = signature(model.forward).parameters
        self._cache_name = next((name for name in CACHES if name in self._takes), None)
        self._one_at_a_time: AbstractContextManager[Any] = threading.RLock() if self.rope.varies else nullcontext()
        self.probing = threading.RLock()  # one trial may need the answer of another
        self._closed = False

    def close(self) -> None:
        """End: a pass that begins from now on, or has not ended yet, is refused. Adapters may leave the model then."""
        self._closed = True

    def check_open(self) -> None:
        """Raises LoraRtError once this was closed: what would come is the base's, whatever was asked for."""
        if self._closed:
            raise LoraRtError("this runtime was closed", next_step="Load a new one with lora_rt.Runtime.load()")

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        *,
        plan: Plan | None = None,
        cache: Any = None,
        keep: int | Tensor | None = None,
        padded: bool | None = None,
        by_blocks: bool = True,
    ) -> Tensor:
        """The logits of one pass, (rows, tokens or kept, vocab).

        Args:
            ids, positions: (rows, tokens) of this pass.
            mask: (rows, all tokens so far), 0 on padding.
            plan: under which it runs; None is the base alone.
            cache: of the tokens before, which the pass extends.
            keep: the last n tokens, or their indices in this pass, where not the logits of all are wanted.
            padded: whether the mask hides anything; looked up where it is not said, for which a GPU is waited for.
            by_blocks: whether a step may be `blocks`'; hooks on the model's own blocks need not be called then.

        Raises:
            LoraRtError: it was closed.
        """
        self.check_open()
        rows, tokens = ids.shape
        kept = keep if self._pass.takes_columns else None
        blocks = self.blocks if by_blocks and tokens == 1 and cache is not None else None
        many = by_blocks and tokens > 1 and rows > 0 and not torch.is_grad_enabled()
        prompts = self.prompts if many else None
        with self._one_at_a_time, plan.running(rows, tokens, kept) if plan is not None else base_alone():
            if blocks is not None and blocks.can(cache):
                logits = blocks(ids, positions, mask, cache)
            elif prompts is not None and prompts.can(cache):
                seen = mask if self._hides(mask, padded) else None
                logits = self._pass.kept(prompts(ids, positions, seen, cache, kept), keep)
            else:
                logits = self.by_its_own(ids, mask, positions, cache, keep, padded)
        self.check_open()  # adapters may have left in the middle
        return logits.to(self.device)

    def by_its_own(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, keep: int | Tensor | None, padded: bool | None
    ) -> Tensor:
        """The logits of a pass by the model's own forward, under whatever plan is running."""
        given = self._pass.arguments(ids, self._mask_of(ids, mask, padded, cache), keep) | self._cached(cache)
        if self._pass.takes_positions:
            given["position_ids"] = positions + self._pass.first_position
        if self.rope.varies:
            forget_growth(self.model)
        return self._pass.kept(self.model(**given).logits, keep)

    def _mask_of(self, ids: Tensor, mask: Tensor, padded: bool | None, cache: Any) -> Tensor | None:
        """The mask as a pass is given it; None where it is left out."""
        if cache is not None and ids.shape[1] == 1 and self.groups_heads:
            return _of_columns(mask)
        # The mask is left out where nothing is padded: the kernel without one is faster.
        return mask if not self._pass.takes_positions or self._hides(mask, padded) else None

    @staticmethod
    def _hides(mask: Tensor, padded: bool | None) -> bool:
        return not bool(mask.all()) if padded is None else padded

    def at_columns(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The last logits (rows, 1, vocab) of a pass over a cache in fixed places, under whatever plan is running.

        Args:
            ids, positions: (rows, 1).
            mask: (rows, 1, 1, columns), true where a row looks at a column.
            cache: of `lora_rt.core.forward.fixed_cache`.
        """
        given = self._pass.arguments(ids, None, 1) | self._cached(cache)
        places = positions + self._pass.first_position
        logits: Tensor = self.model(**given, attention_mask=mask, position_ids=places).logits
        return logits[:, -1:]

    @property
    def takes_positions(self) -> bool:
        """Whether a pass is told where its tokens stand; else the model counts by mask or cache."""
        return self._pass.takes_positions

    @cached_property
    def steps(self) -> Steps | None:
        """Decoding steps that are recorded, where the device has that and the model's passes are all alike.

        `$LORA_RT_CUDA_GRAPHS` of 0 says that nothing is to be recorded.
        """
        wanted = self.device.type == "cuda" and os.environ.get(_VARIABLE, "") != "0"
        return Steps(self, on_cuda()) if wanted and self.records else None

    @property
    def blocks(self) -> DecoderStep | None:
        """The step of this model by its blocks on a CPU, where a trial of it went well.

        `$LORA_RT_BLOCKS` of 0 says that there is to be none, of 1 that even a base is stepped so which is so small that
        to load what was compiled takes longer than all that it will save.
        """
        return self._blocks if self._may_pass("_blocks") else None

    @property
    def prompts(self) -> DecoderPrompt | None:
        """Its pass over many tokens, where a trial of it went well; see `blocks`."""
        return self._prompts if self._may_pass("_prompts") else None

    def _may_pass(self, name: str) -> bool:
        """Whether such passes were tried, or may be now: who watches the model may be gone with the next pass."""
        return name in vars(self) or (self._has_blocks and not is_watched(self.model))

    @cached_property
    def _has_blocks(self) -> bool:
        return decoder_trial.may_be(self)

    @cached_property
    def _blocks(self) -> DecoderStep | None:
        return decoder_trial.steps_of(self)

    @cached_property
    def _prompts(self) -> DecoderPrompt | None:
        return decoder_trial.prompts_of(self)

    @property
    def records(self) -> bool:
        """Whether a decoding step is the same work every time, and takes a mask as `at_columns` gives it."""
        plain = self.keeping == "shared" and {type(layer) for layer in self.new_cache().layers} == {GrowingLayer}
        attends = getattr(self.model.config, "_attn_implementation", "") == "sdpa"
        whole = {parameter.device for parameter in self.model.parameters()} == {self.device}
        return plain and attends and whole and self._pass.takes_positions and not self.rope.varies

    @cached_property
    def groups_heads(self) -> bool:
        """Whether a step on a CPU is told which columns each row sees, though it sees all of them.

        Without a mask transformers hands torch the heads of queries that share keys and values one by one, with it all
        of a group at once: in bfloat16 that is nine times as fast (16 rows of 90 tokens, 9 heads over 3: 3.8 ms a layer
        and 0.43). It is tried, as whether a model takes such a mask is nowhere said.
        """
        heads = heads_of(self.model.config)
        if self.device.type != "cpu" or heads.keys == heads.queries or not self.records:
            return False
        return self.tried.answer("takes masks of columns", self._takes_columns)

    def _takes_columns(self) -> bool:
        """Whether a step says the same under a mask of columns, and what it hides changes nothing.

        A model that adds the mask to its scores would take it as well, and hide next to nothing. One that takes no
        mask in a step at all (a mixture that weighs its experts' loss by it) is given none where no row is padded.
        """
        try:
            return self._hides_columns()
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False

    def _hides_columns(self) -> bool:
        rows, mask = self.rows_to_try()
        if not self.ignores_padding:
            mask = torch.ones_like(rows)
        positions = positions_of(mask)

        def step(ids: Tensor, last: Tensor) -> Tensor:
            cache = self.new_cache()
            self._raw(ids[:, :-1], mask[:, :-1], cache)
            return self._raw(ids[:, -1:], last, cache, positions[:, -1:])

        other = rows.where(mask.bool(), rows.flip(1) + 1)  # under the padding
        with self.probing, torch.inference_mode():
            usual = step(rows, mask)
            found, changed = (step(ids, _of_columns(mask)) for ids in (rows, other))
        exact = is_exact(usual)
        return are_near(found, usual, 0.01 if exact else 0.5) and are_near(changed, found, 1e-3 if exact else 0.05)

    def _cached(self, cache: Any) -> dict[str, Any]:
        """The arguments that say where keys and values are kept."""
        kept = {} if cache is None or self._cache_name is None else {self._cache_name: cache}
        return kept | ({"use_cache": cache is not None} if "use_cache" in self._takes else {})

    @cached_property
    def keeping(self) -> Keeping:
        """How keys and values are kept; a cache is tried before it is trusted."""
        if self._cache_name is None or "use_cache" not in self._takes:
            return "none"
        usual = self._cache_name == CACHES[0] and not keeps_a_state(self.model)
        try:
            kinds = {type(layer) for layer in self.new_cache().layers}
        except (AttributeError, KeyError, TypeError, ValueError):
            return "none"
        if not self.tried.answer("keeps rows apart", self._keeps_rows_apart):
            return "none"
        return "shared" if usual and kinds <= {GrowingLayer, GrowingWindow, DummyLayer} else "apart"

    def new_cache(self) -> Any:
        """An empty cache of the kinds of layers that this model has."""
        return let_grow(DynamicCache(config=self.model.config))

    @cached_property
    def ignores_padding(self) -> bool:
        """Whether a row padded on the left gets what it gets alone; where not, only rows of one length share a pass.

        Tried on the model: other tokens under the padding may change nothing, and the shift hardly anything (in few
        bits, a batch of another shape is rounded otherwise).
        """
        return self.tried.answer("ignores padding", self._ignores_padding)

    def _ignores_padding(self) -> bool:
        with self.probing, torch.inference_mode():
            rows, mask = self.rows_to_try()
            one = self._raw(rows, mask)
            rows[0, :PADDING] = rows[0, :PADDING].flip(0) + 1
            other = self._raw(rows, mask)
            alone = self._raw(rows[:1, PADDING:], mask[:1, PADDING:])
        # Exact would be 0; in a mixture of experts other padding makes other products, rounded otherwise.
        strict = 1e-3 if one.dtype == torch.float32 else 0.05
        return are_near(one[0], other[0], strict) and are_near(
            one[0], alone[0], max(strict, 0.01) if is_exact(one) else 0.5
        )

    def share(self, length: int) -> Hashable:
        """Equal for rows that may stand in one pass: of one set of rope factors, and unpadded where that matters."""
        return self.rope.factors(length), None if self.ignores_padding else length

    def parts(self, lengths: Sequence[int]) -> list[list[int]]:
        """The numbers of rows that may share a pass when they are padded on the right, which no token looks at."""
        found: dict[Hashable, list[int]] = {}
        for number, length in enumerate(lengths):
            found.setdefault(self.rope.factors(length), []).append(number)
        return list(found.values())

    def rows_to_try(self) -> tuple[Tensor, Tensor]:
        """Two texts by which a model is tried, (2, tokens), and their mask: the first one is padded."""
        rows = torch.stack([self._text(0), self._text(1)])
        mask = torch.ones_like(rows)
        mask[0, :PADDING] = 0
        return rows, mask

    def _text(self, number: int) -> Tensor:
        """Some tokens, (tokens,)."""
        vocabulary = vocabulary_of(self.model.config)
        return (torch.arange(PROBE, device=self.device) * 37 + 11 * number + 5) % max(vocabulary - 8, 1)

    def _raw(self, ids: Tensor, mask: Tensor, cache: Any = None, positions: Tensor | None = None) -> Tensor:
        """The last logits of the base alone, (rows, vocab); hooks that someone has put on the model are not called."""
        given = self._pass.arguments(ids, mask) | self._cached(cache)
        if positions is not None:
            given["position_ids"] = positions + self._pass.first_position

        def alone() -> Tensor:
            with base_alone():
                logits: Tensor = self.model.forward(**given).logits
            return logits[:, -1].to(self.device)

        with self._one_at_a_time:
            return Context().run(alone)  # a trial may stand within a pass that is stopped half-way: that is none of it

    @cached_property
    def reads_in_parts(self) -> bool:
        """Whether a text may be read in several passes of several tokens each, which keys and values always allow.

        Some models of states (Jamba, Zamba) go on from theirs with a single token, and begin anew with more.
        """
        return self.keeping == "shared" or self.tried.answer("reads in parts", self._reads_in_parts)

    def _reads_in_parts(self) -> bool:
        text, cache, read = self._text(0)[None], self.new_cache(), 0
        mask = torch.ones_like(text)
        with self.probing, torch.inference_mode():
            found = whole = self._raw(text, mask)
            try:
                for end in (PROBE - 4, PROBE - 2, PROBE):
                    found, read = self._raw(text[:, read:end], mask[:, :end], cache), end
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return False
        return are_near(found, whole, 0.01 if is_exact(whole) else 0.2)

    def _keeps_rows_apart(self) -> bool:
        """Whether two rows that are read in turn, with a cache each, get what reading all tokens at once gives."""
        texts = [self._text(number)[None] for number in range(2)]
        mask = torch.ones_like(texts[0])
        with self.probing, torch.inference_mode():
            whole = [self._raw(text, mask) for text in texts]
            try:
                caches = [self.new_cache() for _ in texts]
                for text, cache in zip(texts, caches, strict=True):
                    self._raw(text[:, :-2], mask[:, :-2], cache)
                stepped = whole
                for end in (PROBE - 1, PROBE):
                    stepped = [
                        self._raw(text[:, end - 1 : end], mask[:, :end], cache)
                        for text, cache in zip(texts, caches, strict=True)
                    ]
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return False
        near = 0.01 if is_exact(whole[0]) else 0.5
        return all(are_near(a, b, near) for a, b in zip(whole, stepped, strict=True))


def _of_columns(mask: Tensor) -> Tensor:
    """(rows, 1, 1, columns) of a mask (rows, columns) of the one token that each row reads."""
    return mask.bool()[:, None, None]
