"""What a model is worth on unseen pictures: figures, the protocols that take them, and the report."""
