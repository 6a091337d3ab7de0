"""Makers of tiny random checkpoints in the released layout, for tests and for trying an installation out."""
