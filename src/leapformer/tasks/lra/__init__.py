"""Long-Range Arena: the data of its five tasks.

The layouts and definitions are in docs/lra.md. Each module is imported on its own, for example
`from leapformer.tasks.lra.dataset import load`; this file imports none, so that it costs nothing.
"""

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
