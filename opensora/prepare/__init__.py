"""From raw videos to a training set: steps over rows, the guard that runs them, and the engine of one machine."""
