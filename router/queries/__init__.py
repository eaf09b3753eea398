"""Queries in, submissions out. Knows no models."""
