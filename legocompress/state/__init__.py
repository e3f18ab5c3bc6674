"""What a model carries: where it comes from, and what was done to it, as plain values."""
