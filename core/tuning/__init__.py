"""Fitting weights and gates by gradient, with the base and its adapters frozen.

Every step is one forward pass under the engine's own plan; the gradient leads through the plan's gates to what is
fitted. Nothing here knows a mode: gates are fitted by calling the mode's own hooks on tensors of its state.

frozen.py  base and adapters without gradients of their own    weights.py  weights per adapter or layer: a mix
data.py    examples as tokens                                   scenes.py   a mode's gates and classifier, by scene type
"""
