"""A library of adapters: found, opened, checked, and cleared of duplicates. Knows no queries."""
