"""Finished runs: read from their folder, reported, explained and compared. Knows no models."""
