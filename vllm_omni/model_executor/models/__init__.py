"""Models of autoregressive and generation stages, on vLLM's layers."""
