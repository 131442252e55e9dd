"""The only reader of ConfigDict: configs become networks, losses, samplers, data and runs."""
