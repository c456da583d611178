"""The trainer: STDiT and its three stages. Knows torch and a run directory; nothing of clusters, stores or trackers."""
