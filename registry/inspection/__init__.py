"""Untrusted files in, verified facts out.

    folder     adapter.py             which files there are; no links, no pipes; the order of the checks
    JSON       strict_json            bounded, unambiguous
    config     config.py targets.py patterns.py     what is computed, on which modules; regexes cannot hang
    header     safetensors_header.py  tensor names, dtypes, shapes, offsets, before anything is allocated
    names      modules.py             A and B of every module, against the configuration and the base
    numbers    values.py              finite, sane, hashed

Nothing here imports torch, executes a file or follows what a file names.
"""

from lora_rt.registry.inspection.adapter import InspectedAdapter, inspect_adapter
from lora_rt.registry.inspection.modules import LoraModule

__all__ = ["InspectedAdapter", "LoraModule", "inspect_adapter"]
