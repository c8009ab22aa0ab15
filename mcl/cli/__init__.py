"""Commands: sample.py, convert_weights.py, and what they share."""
