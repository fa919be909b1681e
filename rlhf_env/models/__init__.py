"""Language models with a value head, cached decoding and the frozen reference."""
