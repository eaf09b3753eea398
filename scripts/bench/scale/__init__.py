"""The benchmark of scale: what stages cost by numbers of adapters and queries, and how fast that grows.

measures.py has the measurements, resampled.py the responses of libraries that nobody has, tables.py makes
tables of them.
"""
