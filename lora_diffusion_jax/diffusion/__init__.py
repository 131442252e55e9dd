"""Noise schedules, preconditioning, losses and samplers above the seam denoise(x, sigma)."""
