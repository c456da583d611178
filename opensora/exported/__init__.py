"""Modules that `opensora.export` copies into a folder for diffusers. There they need torch, diffusers and transformers, but not osctl.

Nothing in osctl imports them: they import diffusers, which takes 11 s.
"""
