"""Features, statistics and distances between sets of images."""
