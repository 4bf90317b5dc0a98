"""A base's facts: read once, for every architecture alike."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig

from lora_rt.core.base.shape import ForwardPass, Heads, blocks_of, context_of, heads_of, pad_left, pad_right
from support.tiny import ARCHITECTURES, Zoo, config_of, random_model, some_ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_padded_pass_says_of_real_tokens_what_an_unpadded_one_says(architecture: str) -> None:
    model = random_model(config_of(architecture))
    forward = ForwardPass.of(model)
    rows = [some_ids(1, n, seed=n)[0].tolist() for n in (4, 9)]
    with torch.inference_mode():
        alone = [model(torch.tensor([row])).logits[0] for row in rows]
        for pad, side in ((pad_right, slice(0, 4)), (pad_left, slice(5, 9))):
            ids, mask = pad(rows, "cpu")
            logits = model(**forward.arguments(ids, mask)).logits
            assert_close(logits[0, side], alone[0], rtol=1e-4, atol=1e-4)
            assert_close(logits[1], alone[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("columns", [1, torch.tensor([2, 5])], ids=["the last", "two of them"])
def test_the_wanted_columns_are_the_same_whether_the_model_cuts_or_we_do(
    architecture: str, columns: int | torch.Tensor
) -> None:
    model, ids = random_model(config_of(architecture)), some_ids()
    with torch.inference_mode():
        whole = model(ids).logits
        for forward in (ForwardPass.of(model), ForwardPass(takes_positions=False, takes_columns=False)):
            found = forward.kept(model(**forward.arguments(ids, columns=columns)).logits, columns)
            assert_close(found, whole[:, -1:] if isinstance(columns, int) else whole[:, columns])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_head_reads_of_the_last_columns_lies_together(architecture: str) -> None:
    """Of rows between which others lie, torch multiplies each for itself: fifty times as long in bfloat16."""
    model, ids, seen = random_model(config_of(architecture)), some_ids(3, 6), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, given: seen.append(given[0]))
    with torch.inference_mode():
        for columns in (1, 2, 6):
            model(**ForwardPass.of(model).arguments(ids, columns=columns))
            assert (seen[-1].numel(), seen[-1].stride()[-2]) == (3 * columns * seen[-1].shape[-1], seen[-1].shape[-1])
            assert seen[-1].stride(0) == columns * seen[-1].shape[-1]


def test_blocks_and_heads_are_those_of_the_configuration(zoo: Zoo) -> None:
    model = random_model(config_of("llama"))
    assert blocks_of(model) is model.model.layers
    assert heads_of(model.config) == Heads(4, 2, 16)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        (None, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 8192),
        ({"rope_type": "linear", "factor": 2.0}, 4096),
    ],
)
def test_the_context_is_what_rope_scaling_gives(rope: dict[str, object] | None, context: int) -> None:
    from transformers import BloomConfig, LlamaConfig

    given = {} if rope is None else {"rope_scaling": rope}
    assert context_of(LlamaConfig(max_position_embeddings=4096, **given)) == context
    assert context_of(BloomConfig()) == sys.maxsize


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_model_without_attention_has_one_head_as_wide_as_itself(kind: str) -> None:
    assert heads_of(AutoConfig.for_model(kind, hidden_size=32)) == Heads(1, 1, 32)
