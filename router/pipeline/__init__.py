"""A method that routes, and what a run of it has and keeps."""
