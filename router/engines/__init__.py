"""Engines that answer queries in place of the model in this process."""
