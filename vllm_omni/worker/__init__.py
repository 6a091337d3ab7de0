"""Workers and model runners of autoregressive and generation stages: small subclasses of vLLM's."""
