"""Runs llama.cpp over a base and an adapter, in any Python that has llama-cpp-python or xllamacpp, and nothing of ours.

    python llama_cpp_run.py BASE.gguf ADAPTER.gguf '[[5, 6, 7], ...]'

Prints a JSON list: for each list of tokens the log-probabilities of the next one, over the whole vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from typing import Any

Rows = list[list[float]]


def by_llama_cpp_python(base: str, adapter: str, prompts: list[list[int]]) -> Rows:
    from llama_cpp import Llama

    float32 = 0  # GGML_TYPE_F32: the cache is float16 otherwise
    options: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False}
    model = Llama(model_path=base, lora_path=adapter, type_k=float32, type_v=float32, **options)
    found = []
    for prompt in prompts:
        model.reset()
        model.eval(prompt)
        logits = [float(x) for x in model.scores[len(prompt) - 1]]
        top = max(logits)
        total = top + math.log(sum(math.exp(x - top) for x in logits))
        found.append([x - total for x in logits])
    return found


def by_xllamacpp(base: str, adapter: str, prompts: list[list[int]]) -> Rows:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = base
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": 100_000, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(request)
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append([item["logprob"] for item in sorted(top, key=lambda item: item["id"])])
    return found


if __name__ == "__main__":
    run = by_llama_cpp_python if importlib.util.find_spec("llama_cpp") else by_xllamacpp
    print("ANSWER " + json.dumps(run(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
