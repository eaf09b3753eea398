"""The benchmark of speed: what the pipeline costs in seconds and memory, beside what it is compared with.

measures.py has the measurements, shape.py those of layers with Mistral's dimensions, tables.py makes medians,
ranges and tables of them.
"""
