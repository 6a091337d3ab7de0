"""Trains, checks and exports the small text-to-image model that the package ships."""
