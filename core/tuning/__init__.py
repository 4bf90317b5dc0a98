"""Fitting weights and gates by gradient, with the base and its adapters frozen.

Every step is one forward pass under the engine's own plan; the gradient leads through the plan's gates to what is
fitted. Nothing here knows a mode: gates are fitted by calling the mode's own hooks on tensors of its state.

settings.py  what a fit is told and where it may go      weights.py  weights per adapter or layer
frozen.py    base and adapters without gradients         scenes.py   a mode's gates and classifier, by scene type
data.py      examples as tokens                          mixes.py    a composition whose mode decides, by token or scene
saving.py    what a fit leaves behind                    session.py  from the command line to a finished fit
classifier.py  a mode's classifier of scene types       shares.py    where gates begin that share out a sum of weights
"""
