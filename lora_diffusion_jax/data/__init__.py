"""Data sets, the deterministic batch order, and augmentation."""
