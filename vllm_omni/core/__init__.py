"""Scheduling of autoregressive and generation stages."""
