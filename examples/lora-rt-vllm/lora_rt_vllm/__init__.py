"""Compositions of LoRA registers as models of a vLLM server: `model="emotion:0.7 logic:0.3"`.

launch.py    starts vLLM with the flags and the environment that this takes, or says why it can't
settings.py  what the launcher tells the plugin
front.py     in front of vLLM's API: one spelling per composition, and no way to load a path of a client's choice
resolver.py  vLLM's question "where is the adapter of this name?"
answers.py   from the text of a composition to the folder of its export, or the reason why there is none
spelling.py  one spelling per composition
cache.py     exports on disk, each made once, none removed that a running server may name
shared.py    the compositions of this process, which resolver and front share

It stands on `import lora_rt` and on vLLM's `vllm.lora`.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes, some of which never resolve anything: nothing heavy is imported."""
    from lora_rt_vllm.resolver import register_resolver

    register_resolver()
