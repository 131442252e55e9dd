"""One file per family of experiments; each docstring says how to run it and what to expect."""
