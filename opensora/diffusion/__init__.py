"""The training objectives and how each draws samples: IDDPM as published, rectified flow, guidance."""
