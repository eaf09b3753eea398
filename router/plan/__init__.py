"""Seconds and memory of a run, before anything is loaded."""
