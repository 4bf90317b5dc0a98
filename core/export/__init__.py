"""A composition as something that others load.

gguf.py           one GGUF file for llama.cpp and Ollama
architectures.py  how llama.cpp names and orders a model's layers
"""
