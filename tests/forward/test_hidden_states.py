"""The base's early hidden state: of any depth, of any kind of decoder, and once per token of a running batch."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lora_rt import Runtime
from lora_rt.core.base.shape import pad_left, pad_right, positions_of
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
    hook.remove()
    early.close()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("depth", [0, 1])
def test_rows_that_join_and_leave_are_read_once_too(zoo: Zoo, kind: str, depth: int) -> None:
    """`b` and `c`, which is shorter, join `a` in the middle; `a` leaves, and comes back alone."""
    engine = Engine(zoo.base(kind))
    early = EarlyHidden(engine.lm, LAYERS)
    history = EarlyHistory(early)
    texts = {"a": [5, 6, 7, 8, 9, 10, 11, 12], "b": [5, 6, 7, 21, 22, 23, 24, 25], "c": [31, 32, 33, 34, 35, 36]}
    read: list[int] = []
    assert engine.lm.keeping == "shared"  # which is tried when it is first asked for
    assert engine.lm.groups_heads is not None
    hook = engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, inputs: read.append(inputs[0].shape[1])
    )

    def states(lengths: dict[str, int], new: int) -> list[int]:
        ids, mask = pad_left([texts[name][:length] for name, length in lengths.items()], engine.lm.device)
        parts = ids, mask, positions_of(mask)
        read.clear()
        found = history(*parts, new, depth)
        tokens = list(read)
        seen = mask[..., None].bool()
        assert_close(found.where(seen, 0.0), early(*parts, depth).where(seen, 0.0), **EXACT)
        return tokens

    assert states({"a": 4}, 4) == [4]
    assert states({"a": 5}, 1) == [1]
    assert states({"b": 5, "c": 3}, 5) == [5]
    assert states({"b": 6, "a": 6, "c": 4}, 1) == [1]
    assert states({"b": 7, "a": 7, "c": 5}, 1) == [1]
    assert states({"c": 6, "b": 8}, 1) == [1]
    assert states({"a": 8}, 1) == [1]  # what was read of it lies beside what was read of the others
    hook.remove()
    early.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_that_were_padded_on_the_right_are_not_taken_for_rows_padded_on_the_left(
    engine: Engine, depth: int
) -> None:
    """Rows that are only read stand so; others with the same tokens speak beside them."""
    early = EarlyHidden(engine.lm, LAYERS)
    history = EarlyHistory(early)
    rows = [[5, 6, 7, 8, 9], [31, 32, 33]]

    def check(ids: torch.Tensor, mask: torch.Tensor, new: int) -> None:
        parts, seen = (ids, mask, positions_of(mask)), mask[..., None].bool()
        assert_close(history(*parts, new, depth).where(seen, 0.0), early(*parts, depth).where(seen, 0.0), **EXACT)

    check(*pad_right(rows, engine.lm.device), 5)
    check(*pad_left([[*row, 40] for row in rows], engine.lm.device), 1)
    check(*pad_right([[*row, 40, *[50] * n] for n, row in enumerate(rows)], engine.lm.device), 1)
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
