"""What a person wrote: a pipeline, a cluster profile, a price list."""
