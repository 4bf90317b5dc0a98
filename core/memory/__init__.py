"""How much memory a base and its adapters take, told from the configuration alone.

The base is built without a byte of weights: transformers makes its skeleton, transformers' own quantizer replaces the
layers that it would replace, and PyTorch's fake tensors stand in for what would be loaded. What the product does is
then done with it, with the product's own code: a prefill under an adapter bank's plan, a step of a training run with
PEFT's layers and our loss. The tensors alive at each moment are counted. So there is no formula per architecture.

estimate.py  all precisions of one base             inference.py  weights, adapters, KV cache, prefill
skeleton.py  the base without its weights           training.py   gradients, optimizer, activations of a step
live.py      what is alive while code runs          fit.py        what fits on a device
workload.py  what is planned for                    portions.py   how a run does its steps on what is free
                                                    upstream.py   what torch and transformers do not promise

Knows transformers, bitsandbytes and PEFT through `core.base`, `core.engine` and `core.step`; loads no weights.
"""
