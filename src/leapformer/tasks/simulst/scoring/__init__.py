"""What a model writes of a whole data set, its log, and its quality and latency."""
