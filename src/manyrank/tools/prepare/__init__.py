"""A training set from raw rows."""
