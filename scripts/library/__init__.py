"""What made data/: the tasks, the query files and the adapters."""
