"""Image sources, the deterministic batch order, and augmentation."""
