"""Reports as Markdown and as one HTML page, with their figures."""
