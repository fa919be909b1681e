"""Registered tasks with a known truth."""
