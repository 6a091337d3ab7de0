"""Configuration as data: parsed and checked once, frozen afterwards."""
