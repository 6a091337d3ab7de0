"""Autoregressive and generation stages: models, edges between stages, stage configurations."""
