"""`lora-rt bench`: ours, the base alone and its peers, on the same base, prompts and adapters, interleaved in one run."""
