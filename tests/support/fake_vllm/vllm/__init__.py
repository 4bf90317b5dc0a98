"""As much of vLLM 0.32 as a LoRA resolver meets: its names and signatures."""
