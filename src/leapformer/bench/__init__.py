"""What `leapformer bench` measures: attention, decoding, training and what LeaP costs, by ratios within one run."""
