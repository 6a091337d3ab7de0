"""What users touch: the classes `Omni` and `AsyncOmni`, the command line, the HTTP server."""
