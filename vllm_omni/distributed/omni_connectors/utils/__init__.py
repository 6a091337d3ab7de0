"""Serialisation and shared memory beneath the connectors."""
