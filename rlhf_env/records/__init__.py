"""Run folders, checkpoints, strict JSONL, and text made safe to show."""
