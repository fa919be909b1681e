"""The laboratory: many runs, side by side."""
