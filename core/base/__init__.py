"""The one base model: where it comes from, how it is quantized once and kept, and how it is loaded.

From a text       source.py         what --base means            default.py      the default one, out of a wheel
                  choices.py        a precision, a device, without torch
to a folder       hub.py            what the Hub's client says   prepare.py      converted and quantized once, kept
                  identity.py       its digest                   configuration.py  its config.json, looked at
                  probe.py          its template comes to an end, in a process of its own
                  bounded.py        which can be stopped         progress.py     what a slow step says meanwhile
Into memory       load.py           weights, tokenizer, facts    reading.py      by transformers, and the whole of it
                  given.py          a model that a caller has    silence.py      without the libraries' noise
                  precision.py      float32 to int4, and where   packed.py       what bitsandbytes has packed
                  repacking.py      what it would pack           fused.py        fused experts, also in 4 bits
What it is        shape.py          blocks, heads, context       roles.py        what its layers are for
                  upstream.py       what other libraries do not promise
Besides           machine.py        processor, memory, versions  picture.py      whether plots can be drawn
                  random_base.py    of random weights            byte_tokenizer.py  for these

Knows transformers and bitsandbytes; knows nothing of adapters.
"""
