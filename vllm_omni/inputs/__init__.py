"""Prompts and sampling parameters: pure data, checked at the edge."""
