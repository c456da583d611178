"""What a trained stage can do: samples, digits judged, pictures and their names."""
