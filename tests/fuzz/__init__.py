"""Random and damaged input for everything that reads or computes: `make fuzz`, or `python -m tests.fuzz --help`."""
