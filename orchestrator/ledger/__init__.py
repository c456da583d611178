"""What a pipeline has done and decided, in an object store."""
