"""What is run beside the package, as modules and from the root of the repository: data, benchmarks, docs."""
