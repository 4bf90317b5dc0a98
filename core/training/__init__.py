"""Training an adapter: data, PEFT's LoRA on the loaded base, transformers' Trainer, checkpoints, and publication.

What is optimised is the mode's business (`lora_rt_objective`); how the loop runs is the business of this package.
"""
