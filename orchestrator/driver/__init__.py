"""What to do next, and who does it."""
