"""Object detection: annotated images, augmentation that moves their boxes, detectors and COCO's metrics."""
