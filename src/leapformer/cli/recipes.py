"""``leapformer recipes``."""

from __future__ import annotations

from leapformer.cli.late import needs


@needs("lm", "rich.console", "rich.table", "leapformer.training.recipes")
def recipes() -> None:
    """List what can be trained."""
    from rich.console import Console
    from rich.table import Table

    from leapformer.training.recipes import read_recipe, recipe_names

    table = Table(box=None, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for name in recipe_names():
        table.add_row(name, str(read_recipe(name).get("description", "")))
    Console().print(table)
