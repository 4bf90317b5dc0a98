"""PEFT in the three ways that its manual has for several adapters over one base, and its training."""
