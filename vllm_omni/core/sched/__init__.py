"""Schedulers of autoregressive and generation stages."""
