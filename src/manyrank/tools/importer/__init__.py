"""`manyrank import`: translate the recipe of another tool, see `main`."""
