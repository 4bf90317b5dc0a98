"""Which passes of a model are made by its decoder's blocks: each kind of them is held against the model's own first.

What a trial has shown is remembered with the base (`tried.py`), for these releases of what compiles the loops.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextvars import Context
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from lora_rt.core.base.shape import positions_of
from lora_rt.core.engine.plan import base_alone
from lora_rt.core.forward.decoder import Decoder, is_known
from lora_rt.core.forward.decoder_prompt import DecoderPrompt, fits
from lora_rt.core.forward.decoder_step import DecoderStep
from lora_rt.core.native import compiled

if TYPE_CHECKING:
    from lora_rt.core.forward.causal_lm import CausalLM

T = TypeVar("T")

_log = logging.getLogger("lora_rt.engine")

VARIABLE = "LORA_RT_BLOCKS"
PROBE, PADDING = 7, 3  # tokens of the texts by which a model is tried, and how many of one are padding
_LARGE = 4_000_000  # numbers
_BEGINNING = 4  # tokens that are read before the others


def may_be(lm: CausalLM) -> bool:
    """Whether passes may be made so: it is a known decoder, for which to load what was compiled is worth the while."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "0" or lm.device.type != "cpu":
        return False
    large = sum(parameter.numel() for parameter in lm.model.parameters()) >= _LARGE or wanted == "1"
    return large and is_known(lm.model) and lm.records


def steps_of(lm: CausalLM) -> DecoderStep | None:
    """The steps of a model that `may_be` passed so; None where a trial did not go well."""

    def tried() -> DecoderStep | None:
        found = DecoderStep(Decoder(lm.model))
        versions = _versions("numba", "llvmlite", "numpy")
        if found.whole is not None and found.whole.takes_all():
            # What it passes by is what a step by blocks passes by, which need not be compiled for a trial then.
            if lm.tried.answer(f"steps in one call, {versions}", partial(_are_same_in_one_call, lm, found)):
                return found
            found.whole = None
        return found if lm.tried.answer(f"steps by its blocks, {versions}", partial(_are_same, lm, found)) else None

    return _or_none("steps", tried) if compiled.is_there() else None


def prompts_of(lm: CausalLM) -> DecoderPrompt | None:
    """The same of its passes over many tokens; None as well where its widths do not fit their loops."""

    def tried() -> DecoderPrompt | None:
        found = DecoderPrompt(Decoder(lm.model))
        question = f"prompts by its blocks, {_versions('llvmlite')}"
        return found if lm.tried.answer(question, partial(_reads_the_same, lm, found)) else None

    return _or_none("passes over prompts", tried) if fits(lm.model) else None


def _or_none(what: str, tried: Callable[[], T | None]) -> T | None:
    try:
        return tried()
    except Exception as error:  # another release of numba, llvmlite or numpy may refuse it in any way
        text = "%s are made by the base's own forward, which is slower: %s (%s=0 leaves this out)"
        _log.warning(text, what, error, VARIABLE)
        return None


def _versions(*packages: str) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def _are_same_in_one_call(lm: CausalLM, step: DecoderStep) -> bool:
    """The same where every step is one call, whatever is faster; it is none that was not made so."""
    whole = step.whole
    whole.always = True
    try:
        with torch.inference_mode():
            return whole.ready(2, None, None) is not None and _are_same(lm, step)
    finally:
        whole.always = False


def _are_same(lm: CausalLM, step: DecoderStep) -> bool:
    """Whether two steps are those of the model's own forward."""

    def alone(ids: Tensor, mask: Tensor, positions: Tensor) -> bool:
        caches = lm.new_cache(), lm.new_cache()
        for cache in caches:
            lm.by_its_own(ids[:, :-2], mask[:, :-2], positions[:, :-2], cache, 1, True)
        for end in (PROBE - 1, PROBE):
            now = ids[:, end - 1 : end], positions[:, end - 1 : end]
            usual = lm.by_its_own(now[0], mask[:, :end], now[1], caches[0], 1, True)
            if not _are_alike(step(*now, mask[:, :end], caches[1]), usual):
                return False
        return True

    return _tried(lm, alone)


def _reads_the_same(lm: CausalLM, prompt: DecoderPrompt) -> bool:
    """Whether two passes over several tokens are those of the model's own forward, the second one behind the first."""

    def alone(ids: Tensor, mask: Tensor, positions: Tensor) -> bool:
        caches = lm.new_cache(), lm.new_cache()
        for some in (slice(0, _BEGINNING), slice(_BEGINNING, PROBE)):
            now, seen = (ids[:, some], positions[:, some]), mask[:, : some.stop]
            usual = lm.by_its_own(now[0], seen, now[1], caches[0], None, True)
            found = prompt(*now, seen, caches[1], None)
            read = mask[:, some].bool()  # what stands at padding nobody reads
            if not _are_alike(found[read], usual[read]):
                return False
        usual = lm.by_its_own(ids[1:], mask[1:], positions[1:], None, None, False)
        return _are_alike(prompt(ids[1:], positions[1:], None, None, None), usual)

    return _tried(lm, alone)


def _tried(lm: CausalLM, alone: Callable[[Tensor, Tensor, Tensor], bool]) -> bool:
    """What comes out of a trial on two rows, one of them padded, of the base alone."""
    ids, mask = lm.rows_to_try()
    positions = positions_of(mask)

    def run() -> bool:
        with base_alone(), torch.inference_mode():
            return alone(ids, mask, positions)

    with lm.probing:
        return Context().run(run)


def is_exact(logits: Tensor) -> bool:
    """Whether logits are float32, in which different ways to them hardly differ."""
    return logits.dtype == torch.float32


def are_near(one: Tensor, other: Tensor, share: float) -> bool:
    """Whether two sets of logits differ by less than a share of their spread."""
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= share * one.std().clamp(min=1e-6))


def _are_alike(found: Tensor, usual: Tensor) -> bool:
    return are_near(found, usual, 1e-3 if is_exact(usual) else 0.5)
