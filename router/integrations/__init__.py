"""Plugs for other projects. Each module needs the project that it plugs into, and nothing here imports it."""
