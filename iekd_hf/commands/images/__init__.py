"""Image classification: where images come from, how they are augmented and what is measured."""
