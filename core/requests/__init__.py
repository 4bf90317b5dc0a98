"""From what a caller asks for to the plan of every forward pass.

rows.py       one composition and scene per row of a batch
registrar.py  scene types that nobody gave, from the prompt
weigher.py    each term's mode decides its weight
timeline.py   what changes while a text grows
merging.py    phases and layers that share a pass, as gates
planner.py    static weights once, gates anew for every pass
"""
