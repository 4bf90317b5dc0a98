"""Keeps the noise of the libraries below us away from the user: progress bars, advice, and known warnings.

bitsandbytes speaks while it is imported, so the filter on its logger stands as soon as this module does.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings


class _DropKernelsAdvice(logging.Filter):
    """On a CPU bitsandbytes advises to install the `kernels` package; the kernel that it brings itself is fine."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "kernels" not in record.getMessage()


logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_DropKernelsAdvice())


def silence_libraries() -> None:
    """Call before transformers loads anything. Errors still come through; bars, advice and these warnings do not."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*MatMul8bitLt: inputs will be cast.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The GGUF reader's bar is tqdm's own and has no switch.
    bar = modeling_gguf_pytorch_utils.tqdm
    if not isinstance(bar, functools.partial):
        modeling_gguf_pytorch_utils.tqdm = functools.partial(bar, disable=True)
