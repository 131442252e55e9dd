"""Sweeps: many runs of one config, below one folder."""
