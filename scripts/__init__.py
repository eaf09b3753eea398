"""Command-line scripts: training, data, scores. Run them as modules from the repository's root."""
