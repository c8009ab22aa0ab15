"""The embedded model: its world of scenes, its training and its evaluation."""
