"""Drawing image tokens from a trained transformer: options, sampling, the engine, the recipe of a picture (paper §2.6)."""
