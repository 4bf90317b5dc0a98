"""The composition engine: adapters side by side on the rank axis of every adapted linear layer.

    y = W x + B ( g * (A x) )        A: (R, in)   B: (out, R)   R = r_1 + ... + r_K,  alpha/r already folded into B

            x ──────────────► W ────────────────────► (+) ──► y
            │                                          ▲
            └──► A ──► [ r_1 | r_2 | ... | r_K ] ──► B ┘
                              × gate g

`g` broadcasts to (batch, tokens, R): static weights are a constant vector, a batch of different compositions has one
row of `g` each, and a context gate varies it by layer and token. The result equals the dense
W + sum_k w_k s_k B_k A_k; the base's weights are never touched.

The model     topology.py       where adapters can act       heads.py        where its attention heads lie
              layout.py         where rows and tokens lie    wrappers.py     the base within what PEFT wraps around it
An adapter    resident.py       in memory                    fitting.py      checked against the layers that it names
              special.py        what it holds besides A, B   experts.py      on parameters: fused experts, routers
The rank axis bank.py           residents, plans over them   plan.py         a plan, and the pass that runs under it
              stack.py          active A and B, stacked      shared.py       the plan whose rows share a stack
              lanes.py          a lane of factors per row    gates.py        what multiplies the ranks
              site.py           the hook-up of a layer       lru.py          what was laid out, kept (LRU, by bytes)
Few tokens    few_rows.py       what a stack adds on a CPU   pieces.py       the same, read where adapters lie
Many tokens   tiled_factors.py  what adapters add, by AMX  tiled_kernel.py its loops
              tiled_lanes.py    the same of lanes

The engine knows tensors and layers; it knows no files, prompts or modes.
"""
