"""The page and the API: one process, one worker that owns the model, one history."""
