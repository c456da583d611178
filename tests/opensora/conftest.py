"""One thread for every test of the trainer: tiny tensors gain nothing from two, and sums come out alike on every machine."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
