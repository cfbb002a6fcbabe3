"""Semantic segmentation: images with masks, augmentation that moves both, small networks, mean IoU."""
