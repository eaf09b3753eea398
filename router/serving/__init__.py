"""The proxy in front of a server of LoRA adapters: the router names a variant, the server serves it."""
