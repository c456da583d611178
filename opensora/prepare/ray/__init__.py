"""Steps of a preparation on Ray Data: imported only where `engine: ray` is asked for."""
