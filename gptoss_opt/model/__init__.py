"""The one place that knows Hugging Face names and versions."""
