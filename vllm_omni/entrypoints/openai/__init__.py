"""The HTTP server: OpenAI's endpoints over ``AsyncOmni``."""
