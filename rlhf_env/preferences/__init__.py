"""Comparisons of responses and the simulated people who make them."""
