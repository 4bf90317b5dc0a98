"""A base with everything that lets adapters act over it: put together here, for a runtime, a fit and a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from lora_rt.core.base.load import LoadedBase
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.forward.decoder import can_be_one_call
from lora_rt.core.forward.hidden_states import EarlyHidden
from lora_rt.core.forward.tried import Tried
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.generation.row import PassInfo
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.generation.stopping import SpokenText
from lora_rt.core.multiply.fastest import Products
from lora_rt.core.requests.composition import Composition, per_row
from lora_rt.core.requests.planner import RowPlanner
from lora_rt.core.requests.residents import Residents
from lora_rt.core.requests.rows import Compositions, Row, Scenes, Turns, scenes_per_row
from lora_rt.core.requests.running import RequestRow, Weigh
from lora_rt.core.requests.scene_classifier import SceneClassifier
from lora_rt.core.requests.timeline import Timeline
from lora_rt.core.requests.weigher import Weigher
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry.registry import Registry

_TRIED = 4  # tokens


class AdaptedBase:
    """The parts, each of which knows only those before it."""

    def __init__(
        self,
        base: LoadedBase,
        modes: ModeHost,
        registry: Registry,
        text: TextFormat | None = None,
        multiply: str | None = None,
    ) -> None:
        self.base = base
        self.modes = modes
        self.registry = registry
        with ExitStack() as undo:  # where this fails half-way, too
            undo.callback(base.give_back)
            self.products = Products(base.model, multiply, in_one_call=can_be_one_call(base.model))
            undo.callback(self.products.close)
            self.lm = CausalLM(base.model, Tried(base.remembered_as))
            self.bank = AdapterBank(base.model, base.dtype)
            undo.callback(self.bank.close)
            self.early = EarlyHidden(self.lm, base.facts.layers)
            undo.callback(self.early.close)
            self.residents = Residents(base, self.bank, modes, registry, text)
            self.classifier = SceneClassifier(self.lm, modes, base.facts, self.early)
            self.weigher = Weigher(self.residents, modes, base.facts, self.classifier)
            undo.callback(self.lm.close)  # before the adapters leave
            self._undo = undo.pop_all()

    def rows(
        self,
        ids: Sequence[Sequence[int]],
        compositions: Compositions = None,
        scenes: Scenes = None,
        *,
        prompts: Sequence[Any] | None = None,
        lengths: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        seeds: Sequence[int | None] | None = None,
        spoken: bool = False,
    ) -> list[RequestRow]:
        """The rows of a request.

        Args:
            ids: the tokens of each.
            compositions, scenes: one for all or one per row.
            prompts: what the modes are told of each row's prompt, where it is a text.
            lengths: how many tokens of each row are its prompt; all where left out.
            sampling: how their tokens are chosen. seeds: one per row.
            spoken: whether they follow their text; rows with stop texts do.

        Raises:
            LoraRtError: a composition, a scene or a setting can't be used.
        """
        count = len(ids)
        starts = list(lengths) if lengths is not None else [len(row) for row in ids]
        asked = [row[:start] for row, start in zip(ids, starts, strict=True)]
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts or [None] * count]
        turns = scenes_per_row(scenes, count)
        weighed = self.weigher.rows(per_row(compositions, count), turns, texts, asked)
        chosen = sampling or Sampling()
        follows = spoken or bool(chosen.stop)
        return [
            RequestRow(
                ids[number],
                Timeline(row, self.base.tokenizer.decode, len(ids[number])),
                self._weighing(turns[number], texts[number], asked[number]),
                sampling=chosen,
                seed=seeds[number] if seeds is not None else None,
                prompt_length=starts[number],
                spoken=SpokenText(self.base.tokenizer, chosen.stop) if follows else None,
            )
            for number, row in enumerate(weighed)
        ]

    def _weighing(self, turns: Turns, text: str | None, ids: Sequence[int]) -> Weigh:
        def weigh(composition: Composition | None) -> Row:
            (row,) = self.weigher.rows([composition], [turns], [text], [ids])
            return row

        return weigh

    def try_out(self, row: RequestRow, under: Row) -> None:
        """Make the plan of a few of a row's tokens in each phase, for what a pass would find too late.

        Args:
            under: what it is or will be under.

        Raises:
            LoraRtError: a weight is too large, or a mode does not take the row's scene type.
        """
        few = row.ids[-_TRIED:]
        ids = torch.tensor([few], device=self.lm.device)
        for phase in (under, *under.phases.values()):
            timeline = Timeline(replace(phase, phases={}), self.base.tokenizer.decode)
            trial = RequestRow(few, timeline, lambda _: under)
            with torch.inference_mode():
                self.planner()(PassInfo.of([trial], ids, torch.ones_like(ids)), [trial])

    def planner(self) -> RowPlanner:
        """The planner of one batch."""
        return RowPlanner(self.bank, self.modes, self.base.facts, self.early)

    def close(self) -> None:
        """Give the model its own layers back, and a caller's model as it was."""
        self._undo.close()
