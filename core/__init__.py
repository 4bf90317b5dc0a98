"""The runtime: base, engine, composition, generation, training, evaluation and the command line."""
