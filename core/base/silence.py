"""Keeps the noise of the libraries below us away while we use them: progress bars, advice, and known warnings.

An application that embeds the runtime has settings of its own; they are put back when our own work is done.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lora_rt.core.base.upstream import gguf_bar_hidden


def _is_no_advice(record: logging.LogRecord) -> bool:
    """On a CPU bitsandbytes advises to install the `kernels` package; the kernel that it brings itself is fine."""
    return "kernels" not in record.getMessage()


_EXPECTED = (
    (".*MatMul8bitLt: inputs will be cast.*", UserWarning),
    ("inner dimension .* is not aligned for fast kernel.*", UserWarning),  # of a 4-bit layer on a GPU
    (".*is_gradient_checkpointing.*", FutureWarning),
    ("Cannot (enable|disable) progress bars", UserWarning),  # where the environment decides
)


def silence_this_process() -> None:
    """For a program of our own, before transformers is imported: for as long as the process lives."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _expect_warnings()
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_advice)


@contextmanager
def libraries_silenced(*, gguf: bool = False) -> Iterator[None]:
    """Within the block transformers and bitsandbytes say errors alone; afterwards everything is as it was before.

    The settings are the process's: meanwhile they hold for its other threads, too.

    Args:
        gguf: a GGUF file is read within it. transformers' reader takes half a second to import.
    """
    from transformers.utils import logging as upstream

    adviser = logging.getLogger("bitsandbytes.backends.cpu.ops")
    verbosity, bars = upstream.get_verbosity(), upstream.is_progress_bar_enabled()
    ours = _is_no_advice not in adviser.filters
    with warnings.catch_warnings(), gguf_bar_hidden() if gguf else nullcontext():
        _expect_warnings()
        adviser.addFilter(_is_no_advice)
        upstream.set_verbosity_error()
        upstream.disable_progress_bar()
        try:
            yield
        finally:
            upstream.set_verbosity(verbosity)
            if bars:
                upstream.enable_progress_bar()
            if ours:
                adviser.removeFilter(_is_no_advice)


@contextmanager
def data_sets_silenced(datasets: Any) -> Iterator[None]:
    """The same of `datasets`, and of the Hub's client: it tells each of its attempts, and we what came of them."""
    logs = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before, bars = [log.level for log in logs], datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _expect_warnings() -> None:
    for message, category in _EXPECTED:
        warnings.filterwarnings("ignore", message=message, category=category)
