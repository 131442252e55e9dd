"""U-Nets of the EDM line and of improved diffusion, without any LoRA code."""
