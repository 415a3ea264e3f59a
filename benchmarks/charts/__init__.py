"""Charts for people, drawn from the lines of results/, and the page that shows them: python -m benchmarks.charts."""
