"""From pixels to latents and from captions to token vectors, and back to pixels."""
