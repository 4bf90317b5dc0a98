"""`lora-rt bench`: lora-rt, the base alone and its peers on the same base, prompts and adapters, in one run."""
