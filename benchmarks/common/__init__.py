"""What several benchmarks share: data, networks, rows of results, tables and command lines."""
