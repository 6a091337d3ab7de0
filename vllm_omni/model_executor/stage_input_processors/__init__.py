"""Edge functions: outputs of one stage to the input of the next, by model family."""
