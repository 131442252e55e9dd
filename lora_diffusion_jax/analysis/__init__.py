"""Looking at trained adapters."""
