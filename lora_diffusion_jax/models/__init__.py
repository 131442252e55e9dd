"""The U-Nets, without any LoRA code."""
