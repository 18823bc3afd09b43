"""What `leapformer bench` measures: one module for each benchmark, by ratios within one run."""
