"""Cycle training's data: texts or scenes that have no partner get one from the bridge itself (back-translation).

What the bridge made is only ever the prompt, and what was given is the target: a text teaches expanding, a scene
teaches compressing. Train on the pairs and these lines together; repeat for another turn of the cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.bridge.hyper import HyperBridge


def cycle_pairs(bridge: HyperBridge, texts: Sequence[str] = (), scenes: Sequence[str] = ()) -> list[dict[str, str]]:
    """Training lines {"scene", "text", "direction"}, each for one direction; those with an empty partner are left out."""
    made_scenes, made_texts = bridge.compress(list(texts)), bridge.expand(list(scenes))
    lines = [
        {"scene": scene, "text": text, "direction": "expand"} for scene, text in zip(made_scenes, texts, strict=True)
    ]
    lines += [
        {"scene": scene, "text": text, "direction": "compress"} for scene, text in zip(scenes, made_texts, strict=True)
    ]
    return [line for line in lines if line["scene"] and line["text"]]
