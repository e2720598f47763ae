"""Put an adapter into its base, and prove the result."""
