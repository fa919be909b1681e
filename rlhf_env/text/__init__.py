"""Tokenizers, prompt sources and the built-in corpus."""
