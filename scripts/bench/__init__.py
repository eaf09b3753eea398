"""The benchmarks: `quality` and `speed`, on one runner, one timer and one scorer.

They read labels, so nothing under router/ or merge/ may import them.
"""
