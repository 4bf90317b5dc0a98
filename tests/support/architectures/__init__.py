"""Every causal architecture of the installed transformers, as a tiny random base, checked against PEFT.

shrink.py   the smallest configuration of a type, by rules that name fields and not models
oracle.py   what PEFT computes with the tensors that it has in memory
checks.py   what is checked of a type
table.py    runs the checks in processes of their own, and writes what they found

make architectures        the whole table; tests/architectures runs a dozen types
"""
