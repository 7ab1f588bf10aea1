"""What grounding does to a prompt: scores with and without it, attention to it, words near it."""
