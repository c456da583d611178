"""Weights on disk: read, written, and taken over from other projects."""
