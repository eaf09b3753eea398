"""What makes the figures and tables of docs/, except for those of the benchmarks."""
