"""What the pipeline costs in seconds and memory, beside what it is compared with."""
