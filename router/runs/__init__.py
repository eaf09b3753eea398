"""Finished runs: read from their folder, reported, explained and compared. Loads no model."""
