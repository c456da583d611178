"""The network: STDiT, and what it is made of."""
