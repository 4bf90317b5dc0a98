"""The composition engine: adapters side by side on the rank axis of every adapted linear layer.

    y = W x + B ( g * (A x) )        A: (R, in)   B: (out, R)   R = r_1 + ... + r_K,  alpha/r already folded into B

            x ──────────────► W ────────────────────► (+) ──► y
            │                                          ▲
            └──► A ──► [ r_1 | r_2 | ... | r_K ] ──► B ┘
                              × gate g

`g` broadcasts to (batch, tokens, R): static weights are a constant vector, a batch of different compositions has one
row of `g` each, and a context gate varies it by layer and token. The result equals the dense
W + sum_k w_k s_k B_k A_k; the base's weights are never touched.

topology.py  where adapters can act in a model         bank.py    the residents, and plans over them
stack.py     the active residents' A and B, stacked    shared.py  the plan whose rows share a stack
lanes.py     the plan whose rows have a lane each      gates.py   what multiplies the ranks
site.py      the hook-up of a linear layer             wrappers.py  the base within what PEFT wraps around it
plan.py      a plan, and the pass that runs under it   hidden_states.py  the base's early hidden state
lru.py       what was laid out, kept (LRU, by bytes)

The engine knows tensors and layers; it knows no files, prompts or modes.
"""
