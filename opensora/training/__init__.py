"""A stage on one rank: where it starts, its steps, what follows the last one, and the run directory."""
