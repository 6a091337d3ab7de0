"""Helpers for reading checkpoints."""
