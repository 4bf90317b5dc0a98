"""The text of a composition -> rows of a batch -> the plan of each forward pass.

composition.py       `emotion:0.7 logic:0.3`: terms, weights, and the text given back
activation.py        the bracket that says from which words on a term acts
named.py             named compositions inside compositions, and what a name means during one request
moded.py             named compositions with a mode of their own, in memory
residents.py         the adapters in memory, loaded where they are not
reading.py           the files of an adapter as factors
rows.py              one composition and scene per row of a batch
scene_classifier.py  scene types that nobody gave, from the prompt
weigher.py           each term's mode decides its weight
measured.py          what was measured of weights, and lies outside of it
adapted.py           all of these over one base, and the rows of a request
running.py           a row while it runs: its composition can be changed
timeline.py          what changes while a text grows
merging.py           phases and layers that share a pass, as gates
planner.py           static weights once, gates anew for every pass
answered.py          the document of an answer
explaining.py        how much each adapter adds, by layer, head and token

Importing `composition` needs neither torch nor transformers.
"""
