"""Compositions as people write them: `emotion:0.7 logic:0.3`.

parsing.py     terms, weights, and the text given back
activation.py  the bracket that says from which words on a term acts
mixing.py      named compositions inside compositions
"""

from lora_rt.core.composition.parsing import Composition, InvalidCompositionError, Term

__all__ = ["Composition", "InvalidCompositionError", "Term"]
