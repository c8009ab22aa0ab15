"""Motion measured in finished pictures, the page that shows the method, and what it costs."""
