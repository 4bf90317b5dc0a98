"""Machine code for the processor at hand: how loops that neither torch nor Python has are written, compiled and run.

    compiled.py        loops of numba's, compiled once and kept in the home
    machine_code.py    functions in LLVM's terms, and how a module of them is compiled
    registers.py       vector registers, for the inner loops of such functions
    amx.py             AMX's tiles: registers of sixteen rows of 64 bytes, and products of two
    amx_factors.py     factors of adapters as such tiles, laid out where they are multiplied
    in_c.py            what compiled loops read and call by addresses
    bfloat16.py        numbers in 16 bits, read and rounded
    openmp.py          torch's own threads, which run what is compiled here

Knows instructions, addresses and threads; knows no weight and no model.
"""
