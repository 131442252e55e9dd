"""Conditioned LoRA on the attention layers of diffusion U-Nets, in JAX and Flax."""

__version__ = "0.2.0"
