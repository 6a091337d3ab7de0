"""Layers that models of several families share."""
