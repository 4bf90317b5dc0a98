"""llama.cpp through llama-cpp-python, where it is installed: scales per request, one request after the other.

llama.cpp never puts requests with differing scales into one batch, so the rows of a workload run one by one. Its base
is a GGUF file in a quantization of its own (Q4_1 for the default base), so it need not say what the others say; its
adapters are written by our exporter.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_rt.core.base import default
from lora_rt.core.base.source import DEFAULT
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.system import System, Turn, timed
from lora_rt.core.benchmark.workloads import Mix, Workload
from lora_rt.core.engine.topology import features
from lora_rt.core.export.gguf import write_gguf_adapter
from lora_rt.core.requests.reading import read_adapter
from lora_rt.registry import home
from lora_rt.registry.inspection import inspect_adapter

_CONTEXT = 1024


class LlamaCpp(System):
    """One sequence at a time, with its own scales."""

    name = "llama.cpp"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._loaded: dict[Path, Any] = {}
        self._handles: dict[str, Any] = {}

    def reason(self, workload: Workload) -> str | None:
        """It needs its package and a GGUF file of the base, and is no part of what processes measure."""
        if importlib.util.find_spec("llama_cpp") is None:
            return "llama-cpp-python is not installed"
        if self._gguf() is None:
            return "no GGUF file of this base here"
        if workload.sampled:
            return "measured greedily alone"
        return None if workload.kind in ("decode", "prefill", "change") else "not measured"

    def prepare(self, workload: Workload) -> None:
        """The adapters as GGUF files, loaded once each."""
        from llama_cpp import llama_cpp

        paths = self.lab.adapters(workload)
        for name, path in paths.items():
            if path not in self._loaded:
                file = str(self._export(path, name)).encode()
                self._loaded[path] = llama_cpp.llama_adapter_lora_init(self._llama.model, file)
        self._handles = {name: self._loaded[path] for name, path in paths.items()}

    def run(self, workload: Workload) -> Turn:
        """The rows one by one: their times add up."""
        turns = []
        for ids, mix in zip(self.lab.prompts(workload), workload.mixes, strict=True):
            self.change(mix)
            turns.append(timed(self.lab, lambda ids=ids: self._steps(ids, workload.steps)))  # type: ignore[misc]
        prefill, decode = sum(turn.prefill for turn in turns), sum(turn.decode for turn in turns)
        return Turn(prefill, decode, [turn.tokens[0] for turn in turns])

    def change(self, mix: Mix) -> None:
        """The adapters of a request and their scales; newer versions take all of them at once."""
        from llama_cpp import llama_cpp

        if hasattr(llama_cpp, "llama_set_adapters_lora"):
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(mix))(*(self._handles[name] for name, _ in mix))
            scales = (ctypes.c_float * len(mix))(*(weight for _, weight in mix))
            llama_cpp.llama_set_adapters_lora(self._llama.ctx, adapters, len(mix), scales)
            return
        llama_cpp.llama_clear_adapter_lora(self._llama.ctx)
        for name, weight in mix:
            llama_cpp.llama_set_adapter_lora(self._llama.ctx, self._handles[name], weight)

    def _steps(self, ids: Sequence[int], steps: int) -> Iterator[list[int]]:
        """The most likely token behind the prompt and behind each further step, as the only row."""
        from llama_cpp import llama_cpp

        self._llama.reset()
        for _ in range(steps):
            self._llama.eval(list(ids))
            logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
            ids = [int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())]
            yield ids

    @cached_property
    def _llama(self) -> Any:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        layers = -1 if self.lab.device.type == "cuda" else 0
        counts = {"n_threads": threads, "n_threads_batch": threads, "n_gpu_layers": layers}
        return Llama(str(self._gguf()), n_ctx=_CONTEXT, verbose=False, **counts)

    def _export(self, path: Path, name: str) -> Path:
        shapes = {name: features(module) for name, module in self.lab.linears.items()}
        inspected = inspect_adapter(path, name=name, linears=shapes, base=self.lab.base.identity, load=True)
        file = path / "adapter.gguf"
        write_gguf_adapter(file, read_adapter(inspected, name).factors, self.lab.base.model.config)
        return file

    def _gguf(self) -> Path | None:
        base = self.lab.origin.base
        if self.lab.origin.random is not None:
            return None
        file = home.bases() / "downloads" / Path(default.MEMBER).name if base == DEFAULT else Path(base)
        return file if file.suffix == ".gguf" and file.is_file() else None
