"""From prompts to text: the chat template, sampling, and the decoding loop over the engine's plans."""
