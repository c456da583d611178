"""From captioned clips to batches of latents: sources, the latent cache, the loader."""
