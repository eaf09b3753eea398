"""Routes unlabelled queries over a library of LoRA adapters, without labels and without training."""
