"""Measure how close images are to a data set; see `python eval_fid.py --help`."""

import sys

from lora_diffusion_jax.modes import lora_diffusion_fid as main

if __name__ == "__main__":
    sys.exit(main())
