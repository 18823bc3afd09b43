"""Reading runs and models: learned proportions, plots, tables and the report page."""
