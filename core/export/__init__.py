"""A composition as something that others load: one PEFT adapter, one GGUF adapter, or a merged dense model.

run.py            one export from text to folder
outline.py        what there is to know of the base without its weights
terms.py          which adapters, with which weight in which block, and whether that can be written down
combine.py        one pair of factors per layer
peft.py           ... as a PEFT directory
gguf.py           ... as a GGUF file for llama.cpp and Ollama
architectures.py  how llama.cpp names and orders a model's layers
merged.py         ... added to the dense base
convert.py        a pickled adapter, or one that changed its base, as a plain LoRA
beginnings.py     what an adapter took out of its base, taken off
about.py          what the export says of itself
"""

from lora_rt.errors import LoraRtError


class ExportError(LoraRtError):
    """A composition that has no equivalent in the wanted format."""
