"""Full state by name, complete or absent, for any strategy."""
