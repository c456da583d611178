"""Which clips there are, with which captions, and what of them is used: no pixels, no torch."""
