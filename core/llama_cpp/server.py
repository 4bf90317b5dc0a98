"""llama.cpp in this process, by xllamacpp: given tokens and the scale of each adapter, it chooses the next token.

xllamacpp offers llama.cpp's server and nothing below it. A request for a single token costs what a token of a longer
one costs: the server keeps what it has read. So every token is asked for by itself, and everything else is ours: when
an answer ends, and that a repetition penalty counts the tokens of the answer alone, where llama.cpp's own window would
begin in the prompt.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_rt.core.base.source import BaseError
from lora_rt.core.generation.sampling import Sampling
from lora_rt.errors import LoraRtError

_ORDER = ["penalties", "temperature", "top_k", "top_p"]
"""The order in which our own engine applies them."""


def check_installed() -> None:
    """Raises LoraRtError where llama.cpp is not installed."""
    if find_spec("xllamacpp") is None:
        raise LoraRtError("llama.cpp is not installed", next_step='Run: pip install "lora-rt[llama-cpp]"')


class LlamaServer:
    """A base and adapters in memory; which of them act is part of each request."""

    def __init__(
        self, gguf: Path, adapters: Sequence[Path], context: int, device: str, threads: int | None = None
    ) -> None:
        """
        Args:
            gguf: the base.
            adapters: GGUF files; a request may give each a scale.
            context: tokens of the longest request with its answer.
            device: "auto", "cpu", "cuda" or "cuda:N".
            threads: to compute with; as OMP_NUM_THREADS says, or as llama.cpp would, where left out.

        Raises:
            BaseError: llama.cpp can't load these.
        """
        import xllamacpp

        self.adapters, self.context = list(adapters), context
        self._key = secrets.token_hex(16)  # others on this machine can reach the port
        settings = xllamacpp.CommonParams()
        settings.model.path = str(gguf)
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        settings.n_ctx, settings.n_parallel = context, 1
        settings.warmup, settings.verbosity = False, -1
        settings.cache_ram_mib = 0  # it keeps what was read by tokens alone, not by what it was read under
        settings.port, settings.api_keys = 0, [self._key]
        _place(xllamacpp, settings, device, threads)
        try:
            self._server: Any = xllamacpp.Server(settings)
        except RuntimeError as error:
            text = f"llama.cpp can't load {gguf.name}{f' with {len(adapters)} adapters' if adapters else ''}"
            raise BaseError(text, next_step="Use --engine torch, or another GGUF file") from error
        self._connection = http.client.HTTPConnection(str(urlsplit(self._server.listening_address).netloc))
        weakref.finalize(self, self._connection.close)  # a command ends without closing its runtime

    def next_token(
        self, ids: Sequence[int], said: int, scales: Mapping[Path, float], sampling: Sampling, seed: int
    ) -> int | None:
        """The next token, or None where llama.cpp ends the answer.

        Args:
            ids: prompt and answer so far.
            said: how many of them are the answer's.
            scales: of the adapters that act.
            sampling, seed: how it is chosen.

        Raises:
            LoraRtError: llama.cpp refuses the request.
        """
        request = {
            "prompt": list(ids),
            "n_predict": 1,
            "lora": [{"id": n, "scale": scales.get(path, 0.0)} for n, path in enumerate(self.adapters)],
            "samplers": _ORDER,
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": said,
            "seed": _seed(seed, said),
            "return_tokens": True,
            "response_fields": ["tokens", "stop_type"],
        }
        answer = self._post("/completion", request)
        if answer["stop_type"] == "eos" or not answer["tokens"]:
            return None
        return int(answer["tokens"][0])

    def close(self) -> None:
        """End the server and give its memory back."""
        self._connection.close()
        self._server = None

    def _post(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            response = self._exchange(path, request)
        except (http.client.HTTPException, OSError):  # a connection that lay idle is closed by the server
            self._connection.close()
            response = self._exchange(path, request)
        answer: dict[str, Any] = json.loads(response)
        if (error := answer.get("error")) is not None:
            text = f"llama.cpp refuses the request: {error.get('message', error)}"
            raise LoraRtError(text, next_step="Use --engine torch")
        return answer

    def _exchange(self, path: str, request: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        self._connection.request("POST", path, json.dumps(request), headers)
        return self._connection.getresponse().read()


def _place(xllamacpp: Any, settings: Any, device: str, threads: int | None) -> None:
    """Threads as torch would take them, and the layers on a GPU unless that is not wanted."""
    with suppress(ValueError):
        threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
    if threads is not None and threads > 0:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    kind, _, number = device.partition(":")
    if kind == "cpu" or not (on_gpu := _has_gpu(xllamacpp)):
        settings.n_gpu_layers, settings.fit_params = 0, False  # to fit them to a GPU's memory doubles the time to load
    if kind == "cuda":
        if not on_gpu:
            advice = "Use --device auto, or install a build of xllamacpp for your GPU"
            raise BaseError("this build of llama.cpp has no GPU", next_step=advice)
        settings.main_gpu = int(number or 0)


def _has_gpu(xllamacpp: Any) -> bool:
    kinds = xllamacpp.ggml_backend_dev_type
    on_gpu = (kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU)
    return any(info["type"] in on_gpu for info in xllamacpp.get_device_info())


def _seed(seed: int, said: int) -> int:
    """A seed of 32 bits for one token: llama.cpp begins its random numbers anew at every request."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{said}".encode(), digest_size=4).digest()) % 0xFFFFFFFF
