"""The one base model: where it comes from, how it is quantized once and kept, and how it is loaded.

Knows transformers and bitsandbytes; knows nothing of adapters.
"""
