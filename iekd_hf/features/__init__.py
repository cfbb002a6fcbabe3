"""From a model to its feature maps: which layers, and what each one gives."""
