"""What is there beside tensors: this process, and the memory that is free."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


_TOUCHED = 112 << 20
"""What a run of the default base has beside its tensors and its imports: tokenizer, pages of libraries, kernels."""


def process_bytes() -> int:
    """What a process of ours takes beside tensors: measured on this one, which loads no model, and `_TOUCHED`."""
    from transformers import Trainer  # noqa: F401  # what a run imports counts as well

    return int(psutil.Process().memory_info().rss) + _TOUCHED


def free_bytes(device: str) -> int:
    """Bytes that a process can still take on a device ("cpu", "cuda", "cuda:N"), within its container's limit."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min([int(psutil.virtual_memory().available), *_left_in_container()])


def _left_in_container() -> list[int]:
    """What the control group (version 2) of a container leaves; nothing where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return []
    return [max(0, int(limit) - used)] if limit.isdigit() else []
