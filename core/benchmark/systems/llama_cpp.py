"""llama.cpp through llama-cpp-python, where it is installed: scales per request, one request after the other.

llama.cpp never puts requests with differing scales into one batch, so the rows of a workload run one by one. Its base
is a GGUF file in a quantization of its own (Q4_1 for the default base), and its adapters are written by our exporter.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_rt.core.base import default
from lora_rt.core.base.source import DEFAULT
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Mix, Workload
from lora_rt.core.export.gguf import write_gguf_adapter
from lora_rt.core.requests.reading import read_adapter
from lora_rt.registry import home
from lora_rt.registry.inspection import inspect_adapter

_CONTEXT = 1024
_CHANGES = 10


class LlamaCpp:
    """One sequence at a time, with its own scales."""

    name = "llama.cpp"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._llama: Any = None
        self._handles: dict[Path, Any] = {}

    def reason(self, workload: Workload) -> str | None:
        """It needs its package and a GGUF file of the base, and is no part of what processes measure."""
        if importlib.util.find_spec("llama_cpp") is None:
            return "llama-cpp-python is not installed"
        if self._gguf() is None:
            return "no GGUF file of this base here"
        return None if workload.kind in ("decode", "prefill", "change") else "not measured"

    def prepare(self, workload: Workload) -> Repeat:
        """The adapters as GGUF files, loaded once each."""
        handles = self._load(workload)
        if workload.kind == "change":
            return self._change(workload, handles)
        prompts = self._lab.prompts(workload)

        def repeat() -> Sample:
            times = [self._row(ids, mix, handles, workload) for ids, mix in zip(prompts, workload.mixes, strict=True)]
            prefill, decode = (sum(part) for part in zip(*times, strict=True))
            if workload.kind == "prefill":
                return Sample(prefill, workload.rows * workload.prompt_tokens)
            return Sample(decode, workload.rows * workload.new_tokens)

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What each row says; its base is quantized otherwise, so it need not be what the others say."""
        handles = self._load(workload)
        rows = []
        for ids, mix in zip(self._lab.prompts(workload), workload.mixes, strict=True):
            self._scale(mix, handles)
            row = [self._first(ids)]
            for _ in range(workload.new_tokens):
                row.append(self._next(row[-1:]))
            rows.append(row)
        return rows

    def _row(self, ids: Sequence[int], mix: Mix, handles: dict[str, Any], workload: Workload) -> tuple[float, float]:
        """Seconds of the prompt and of the steps behind it."""
        self._scale(mix, handles)
        start = self._lab.now()
        token = self._first(ids)
        first = self._lab.now()
        for _ in range(workload.new_tokens if workload.kind == "decode" else 0):
            token = self._next([token])
        return first - start, self._lab.now() - first

    def _first(self, ids: Sequence[int]) -> int:
        self._llama.reset()
        return self._next(ids)

    def _next(self, ids: Sequence[int]) -> int:
        """The most likely token behind these, which go behind all before them."""
        from llama_cpp import llama_cpp

        self._llama.eval(list(ids))
        logits = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._llama.n_vocab(),)).argmax())

    def _scale(self, mix: Mix, handles: dict[str, Any]) -> None:
        """The adapters of a request and their scales; newer versions take all of them at once."""
        from llama_cpp import llama_cpp

        if hasattr(llama_cpp, "llama_set_adapters_lora"):
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(mix))(*(handles[name] for name, _ in mix))
            scales = (ctypes.c_float * len(mix))(*(weight for _, weight in mix))
            llama_cpp.llama_set_adapters_lora(self._llama.ctx, adapters, len(mix), scales)
            return
        llama_cpp.llama_clear_adapter_lora(self._llama.ctx)
        for name, weight in mix:
            llama_cpp.llama_set_adapter_lora(self._llama.ctx, handles[name], weight)

    def _change(self, workload: Workload, handles: dict[str, Any]) -> Repeat:
        numbers = count()

        def repeat() -> Sample:
            mixes = [workload.mix(next(numbers)) for _ in range(_CHANGES)]
            start = self._lab.now()
            for mix in mixes:
                self._scale(mix, handles)
            return Sample((self._lab.now() - start) / _CHANGES)

        return repeat

    def _load(self, workload: Workload) -> dict[str, Any]:
        """Resident name -> llama.cpp's handle of the adapter."""
        from llama_cpp import Llama, llama_cpp

        if self._llama is None:
            threads = torch.get_num_threads()
            layers = -1 if self._lab.device.type == "cuda" else 0
            self._llama = Llama(
                str(self._gguf()),
                n_ctx=_CONTEXT,
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=layers,
                verbose=False,
            )
        found = {}
        for name, path in self._lab.shelf.paths(workload).items():
            if path not in self._handles:
                file = self._export(path, name)
                self._handles[path] = llama_cpp.llama_adapter_lora_init(self._llama.model, str(file).encode())
            found[name] = self._handles[path]
        return found

    def _export(self, path: Path, name: str) -> Path:
        inspected = inspect_adapter(
            path, name=name, linears=self._lab.shelf.shapes, base=self._lab.base.identity, load=True
        )
        file = path / "adapter.gguf"
        write_gguf_adapter(file, read_adapter(inspected, name).factors, self._lab.base.model.config)
        return file

    def _gguf(self) -> Path | None:
        base = self._lab.origin.base
        if self._lab.origin.random is not None:
            return None
        file = home.bases() / "downloads" / Path(default.MEMBER).name if base == DEFAULT else Path(base)
        return file if file.suffix == ".gguf" and file.is_file() else None
