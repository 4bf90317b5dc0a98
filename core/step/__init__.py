"""One step of training, which a run repeats and the memory estimate runs once without weights.

    settings.py   what a run is told; knows no torch
    runfile.py    ... in a file, or in the card of what was trained
    adapter.py    PEFT's LoRA on a base, with gradient checkpointing, and the adapter's files
    fused.py      a layer and its adapter as one product on a CPU, and one A for layers that read one input
    norms.py      norms on a CPU in few passes
    packing.py    the rows of a batch one behind the other, and what they share once
    attention.py  attention of packed rows; in float32 on a CPU, whose kernel is slow in fewer bits
    loss.py       the loss of a batch, with logits only where labels are

Knows the base and the engine's topology; neither the Trainer, nor where data comes from, nor where an adapter goes.
"""
