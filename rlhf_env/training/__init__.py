"""Collecting rollouts, the training loop and evaluation."""
