"""Words out while the source is coming in: the streams of a model, and the policies that drive them."""
