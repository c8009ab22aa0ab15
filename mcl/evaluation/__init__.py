"""Motion metrics on generated clips, and the HTML report that shows how a clip came about."""
