"""One static composition at a time, computed by llama.cpp: what `lora-rt compose --engine llama.cpp` speaks through.

    base (a GGUF file) ─► words, facts ──┐                       kept once per base
    adapter ─► adapter.gguf at weight 1 ─┤                       kept once per adapter and base
    prompt ─► TextFormat ─► token ids ───┴─► server ─► next token, one request each, with the scale of every adapter

base.py      the GGUF file of a base, its tokenizer and what it is
convert.py   ... made of a base once, by torch and transformers
words.py     a tokenizer without transformers
adapters.py  adapters as GGUF files, and which compositions have any
server.py    llama.cpp, in this process
runtime.py   answers, as `lora_rt.core.runtime` gives them

Nothing here imports torch where base and adapters were used before. What is said follows the rules of the other
engine: prompts, ends, stops and pieces of text are those of `lora_rt.core.generation`, a repetition penalty counts the
answer's own tokens alone. Sampled texts differ, since the random numbers are llama.cpp's.
"""
