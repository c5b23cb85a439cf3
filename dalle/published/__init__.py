"""Other people's models in this package's idiom: one file a family."""
