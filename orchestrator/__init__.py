"""The control plane: from a pipeline file to committed stages, their ledger and their bill. Never imports torch."""
