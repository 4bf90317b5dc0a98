"""The base's early hidden state: of any depth, of any kind of decoder, and once per token of a running batch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lora_rt import Runtime
from lora_rt.core.base.shape import positions_of
from lora_rt.core.forward.hidden_states import EarlyHidden, EarlyHistory
from lora_rt.errors import LoraRtError
from support.architectures.checks import Subject
from support.engine import Engine
from support.tiny import LAYERS, Zoo, dense_logits, some_ids

IDS = some_ids(rows=2, tokens=6)
EXACT = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def engine(zoo: Zoo) -> Engine:
    return Engine(zoo.base("llama"))


def test_the_early_hidden_state_is_the_base_s_even_inside_a_pass(engine: Engine, zoo: Zoo) -> None:
    folder = zoo.adapter("llama", seed=1, r=8)
    engine.add(folder)
    early = EarlyHidden(engine.lm, LAYERS)
    mask = torch.ones_like(IDS)
    with torch.inference_mode():
        wanted = engine.model(input_ids=IDS, output_hidden_states=True).hidden_states[1]
    plan = engine.plan({folder.name: 1.0})
    assert plan is not None
    with plan.running(*IDS.shape):
        assert_close(early(IDS, mask, positions_of(mask)), wanted, **EXACT)
    assert_close(engine.logits(IDS, None), dense_logits(zoo.base("llama"), [], IDS), **EXACT)


def test_the_early_hidden_state_is_that_of_the_depth_asked_for(engine: Engine) -> None:
    early = EarlyHidden(engine.lm, LAYERS)
    mask = torch.ones_like(IDS)
    with torch.inference_mode():
        wanted = engine.model(input_ids=IDS, output_hidden_states=True).hidden_states
    for depth in range(LAYERS):  # transformers gives the last one after the final norm
        assert_close(early(IDS, mask, positions_of(mask), depth), wanted[depth], **EXACT)
    for depth in (-1, LAYERS + 1):
        with pytest.raises(LoraRtError, match=f"after {depth} blocks, and this base has {LAYERS}"):
            early(IDS, mask, positions_of(mask), depth)
    early.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_running_batch_reads_its_early_state_once_per_token(engine: Engine, depth: int) -> None:
    """Rows of different lengths, a step with several tokens, one that is asked for again, and rows that change."""
    early = EarlyHidden(engine.lm, LAYERS)
    history = EarlyHistory(early)
    ids = torch.arange(3 * 12).view(3, 12) % 200
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    read: list[int] = []
    assert engine.lm.keeping == "shared"
    assert engine.lm.groups_heads
    words = engine.model.get_input_embeddings()
    hook = words.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0].shape[1]))
    for end, new, expected in [(5, 5, 5), (6, 1, 1), (7, 1, 1), (10, 2, 3), (10, 1, 10), (11, 1, 1)]:
        parts = ids[:, :end], mask[:, :end], positions_of(mask[:, :end])
        read.clear()
        found = history(*parts, new, depth)
        assert read == [expected]
        assert_close(found, early(*parts, depth), **EXACT)
    read.clear()
    left = ids[[0, 2], :12], mask[[0, 2], :12], positions_of(mask[[0, 2], :12])
    assert_close(history(*left, 1, depth), early(*left, depth), **EXACT)
    assert read == [12, 12]
    hook.remove()
    early.close()


# Several states of a token on an axis of their own, side by side or behind the tokens; positions that are counted by
# the cache or come after two extra ones; a tower for pictures that has as many blocks.
@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "kind", ["gpt2", "gemma3n_text", "deepseek_v4", "qwen4_exp_text", "prophetnet", "bart", "opt", "git", "got_ocr2"]
)
def test_every_kind_of_decoder_gives_one_state_of_each_token(kind: str, depth: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runtime: Runtime = Subject(kind, tmp_path).runtime
        early = runtime.parts.early
        history = EarlyHistory(early)
        ids = torch.arange(5, 12)[None]

        def states(of: EarlyHidden | EarlyHistory, end: int, *new: int) -> torch.Tensor:
            mask = torch.ones_like(ids[:, :end])
            return of(ids[:, :end], mask, positions_of(mask), *new, depth)

        for end, new in ((5, 5), (6, 1), (7, 1)):
            found = states(history, end, new)
        assert found.shape == (1, 7, runtime.base.hidden_size)
        assert_close(found, states(early, 7), **EXACT)
