"""From references to adapters in memory: resolved, inspected, read, and resident in the engine's bank."""
