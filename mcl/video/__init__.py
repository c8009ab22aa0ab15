"""Videos, animations and images to frames in [-1, 1], and back."""
