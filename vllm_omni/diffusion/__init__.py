"""The diffusion engine: step scheduler, workers, and models written on shared parts."""
