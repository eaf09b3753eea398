"""The base model: loaded, run over prompts, and asked for answers. Knows no library."""
