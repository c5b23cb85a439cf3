"""Training: one loop for every stage, and what surrounds it (data order, checkpoints, logs)."""
