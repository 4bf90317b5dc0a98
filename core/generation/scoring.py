"""How likely a base under a composition finds given answers: one number per token, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.decode import Decoder, PassInfo, Planner


def answer_nll(
    decoder: Decoder,
    planner: Planner,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> list[Tensor]:
    """The negative log-likelihood of each answer token given its prompt and what stands before it.

    Args:
        prompts, answers: token ids per row; an answer has at least one token.

    Returns:
        One float32 tensor (answer tokens,) per row.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(len(row) for row in rows)
    # Padded on the right: real tokens never look to the right, so only the mask and positions have to be true.
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    first = min(len(prompt) for prompt in prompts) - 1
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    logits = decoder.logits(ids, mask, _told(planner, lengths), columns=torch.arange(first, width - 1, device=device))
    wanted = ids[:, first + 1 :].flatten()
    losses = cross_entropy(logits.flatten(0, 1).float(), wanted, reduction="none").view(len(rows), -1)
    starts = [len(prompt) - 1 - first for prompt in prompts]
    return [losses[i, start : start + len(answers[i])].cpu() for i, start in enumerate(starts)]


def _told(planner: Planner, lengths: Tensor) -> Planner:
    """The planner, told where the prompts end, (rows,): in a pass over whole rows a gate can't see it otherwise."""

    def plan(info: PassInfo) -> Plan | None:
        return planner(replace(info, prompt_lengths=lengths))

    return plan


def choices_nll(
    decoder: Decoder,
    planners: tuple[Planner, Planner],
    prompt: Sequence[int],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device,
) -> list[Tensor]:
    """`answer_nll` of several answers to one prompt, which is read once; planners as in `Decoder.continuations`."""
    width = max(len(answer) for answer in answers)
    ids = torch.tensor([[*answer, *[pad_id] * (width - len(answer))] for answer in answers], device=device)
    mask = torch.tensor([[1] * len(answer) + [0] * (width - len(answer)) for answer in answers], device=device)
    logits = decoder.continuations(prompt, ids, mask, planners)
    losses = cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none").view(ids.shape)
    return [losses[i, : len(answer)].cpu() for i, answer in enumerate(answers)]
