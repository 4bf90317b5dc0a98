"""vLLM's question "where is the adapter of this name?", answered with the export of a composition.

A ValueError reaches the client as HTTP 400 with its whole text; None would be a 404 that says nothing.
"""

from __future__ import annotations

import asyncio

from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

NAME = "lora-rt"


class CompositionResolver(LoRAResolver):
    """Compositions of the registers that this machine has."""

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request that loads the adapter of a composition; vLLM numbers it itself.

        Raises:
            ValueError: why there is none.
        """
        folder = await asyncio.to_thread(_folder, lora_name, base_model_name)
        return LoRARequest(lora_name, 1, folder, base_model_name)


def register_resolver() -> None:
    """Tell vLLM; where it is told already, nothing happens."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, CompositionResolver())


def _folder(name: str, model: str) -> str:
    try:
        from lora_rt import LoraRtError
    except ImportError as error:
        raise ValueError("lora-rt is not installed beside vLLM: pip install --no-deps lora-rt") from error
    from lora_rt_vllm.shared import answers

    try:
        return str(answers().folder(name, model))
    except LoraRtError as error:
        raise ValueError(str(error)) from error
