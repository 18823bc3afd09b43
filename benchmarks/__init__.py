"""What this repository measures of itself and owes, no part of the package. Run as `python -m benchmarks.NAME`."""
