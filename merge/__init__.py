"""Exact algebra on low-rank factors; knows nothing of queries, routing or models."""
