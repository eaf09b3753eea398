"""Finished runs: read from their folder, reported, explained and compared. Only `--answers` loads a model."""
