"""`dalle serve`: the page and an API that OpenAI's clients speak, in front of one model."""
