"""Other people's checkpoints become model folders of ours: one file for each kind."""
