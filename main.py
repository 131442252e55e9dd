"""Train, sample, describe, import and export networks; see `python main.py --help`."""

import sys

from lora_diffusion_jax.modes import lora_diffusion as main

if __name__ == "__main__":
    sys.exit(main())
