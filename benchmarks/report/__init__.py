"""Reports of benchmark results: Markdown, plots, terminal tables, comparison."""
