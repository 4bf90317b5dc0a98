"""`lora-rt explain`: which register acted where, as a heat map in the terminal, as JSON, and as a picture."""
