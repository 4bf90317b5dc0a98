"""The built-in modes, one file each. They enter through the entry-point group `lora_rt.modes`, like a stranger's."""
