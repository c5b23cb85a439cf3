"""Drawing image tokens from a trained transformer (paper §2.6): options, sampling, engine, recipe."""
