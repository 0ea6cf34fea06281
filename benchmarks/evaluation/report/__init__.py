"""A result as a table and as an HTML page."""
