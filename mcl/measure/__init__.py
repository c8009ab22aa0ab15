"""Motion measured in finished pictures, pictures of the method, and what it costs."""
