"""llama.cpp's own server, by xllamacpp, in a Python of its own; imports nothing of lora-rt.

    python llama_server.py MODEL.gguf SLOTS TOKENS THREADS [ADAPTER.gguf ...]

Prints its address and serves until it is ended. A request names the scale of each adapter by its place among them:
{"lora": [{"id": 0, "scale": 0.7}]}.
"""

from __future__ import annotations

import sys
import threading


def main() -> None:
    """Serve with so many slots of so many tokens each."""
    import xllamacpp

    model, slots, tokens, threads, *adapters = sys.argv[1:]
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.port = 0
    settings.n_parallel = int(slots)
    settings.n_ctx = int(slots) * int(tokens)
    for share in (settings.cpuparams, settings.cpuparams_batch):
        share.n_threads = int(threads)
    settings.verbosity = -1
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in adapters]
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
