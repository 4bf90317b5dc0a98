"""Untrusted files in, verified facts out.

    folder     adapter.py folder.py   which files there are; no links, no pipes; the order of the checks
    JSON       ../strict_json.py      bounded, unambiguous
    config     config.py settings.py targets.py patterns.py     what is computed, on which modules; regexes cannot hang
    header     safetensors_header.py  tensor names, dtypes, shapes, offsets, before anything is allocated
    names      keys.py modules.py adapted.py experts.py     A and B of every module, against configuration and base
    numbers    reading.py values.py   finite, sane, hashed, handed on: what was checked is what is loaded
    refusals   kinds.py               what else a folder may be (IA3, MLX, a whole model, ...), in one line

Nothing here imports torch, executes a file or follows what a file names.
"""

from lora_rt.registry.inspection.adapted import LoraModule
from lora_rt.registry.inspection.adapter import InspectedAdapter, foreseen, inspect_adapter
from lora_rt.registry.inspection.folder import OwnWeights
from lora_rt.registry.inspection.values import RawTensor

__all__ = ["InspectedAdapter", "LoraModule", "OwnWeights", "RawTensor", "foreseen", "inspect_adapter"]
