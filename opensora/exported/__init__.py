"""What `opensora.export` copies into a folder for diffusers. Runs there without osctl: on torch, diffusers and transformers alone.

Imported by nobody here: these modules import diffusers, which takes 11 s.
"""
