"""``leapformer recipes``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from leapformer.training.recipes import read_recipe, recipe_names


def list_recipes() -> None:
    """Print every recipe that comes with the package and what it trains."""
    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for name in recipe_names():
        table.add_row(name, str(read_recipe(name).get("description", "")))
    Console().print(table)
