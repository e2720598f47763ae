"""Look at a recipe's data."""
