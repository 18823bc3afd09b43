"""`task: lra-denoise`: pre-training on the inputs of a Long-Range Arena task alone."""
