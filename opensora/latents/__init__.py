"""Clips encoded once, and the order in which a stage reads them."""
