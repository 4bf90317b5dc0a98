"""A forward pass of a model under a plan: the whole of it by transformers, and a step of few tokens in fewer calls.

Passes            causal_lm.py      a causal language model, as passes over rows need it
                  hidden_states.py  the first blocks alone: the early hidden state
                  rope.py           rotary factors that depend on the length of the text
                  tried.py          what trying a model has shown, remembered
                  unchanged.py      whether its modules are what they were
                  caches.py         keys and values of rows that join and leave
On a CPU          decoder.py        Llama-like decoders, whose blocks we go through ourselves
                  decoder_trial.py  held against the model's own passes
Many tokens       decoder_prompt.py a pass over a prompt
                  prompt_kernels.py what it does between its products
A step            decoder_step.py   of one token a row
                  kernels.py        what it does between its products
                  tiles.py          products with what adapters hold, and attention
                  growing_cache.py  keys and values with room for more
In one call       whole_step.py     over 4-bit weights, from embedding to output head
                  step_adapters.py  what adapters add to it
                  whole_kernel.py   what its threads do
On a GPU          steps.py          steps that are recorded once and run again
                  pool.py           a plan's tensors in fixed places
                  fixed_cache.py    keys and values in fixed places

Knows models, caches and plans; knows no prompts, settings or modes.
"""
