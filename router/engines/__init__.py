"""What answers queries in place of the model in this process."""
