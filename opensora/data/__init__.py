"""Pixels and captions of clips: where they come from, and how they are cut to a size."""
