"""Attempts that are never trained: intents and a cluster profile for tests of what a backend does with them."""

from __future__ import annotations

import time

from opensora.config import StageConfig
from orchestrator.ledger.keys import run_key
from orchestrator.ledger.records import Intent
from orchestrator.ledger.store import Ledger
from orchestrator.recipe.cluster_profile import ClusterProfile

STEPS = 40
CONFIG = StageConfig.model_validate(
    {
        "objective": {"kind": "flow"},
        "sampling": {"method": "euler"},
        "data": {"source": {"kind": "digits", "clips": 4}, "frames": 1, "height": 16, "width": 16},
        "autoencoder": {"kind": "patch"},
        "text": {"kind": "words"},
        "steps": STEPS,
        "batch_size": 1,
        "checkpoint": {"every_steps": 10},
    }
)
PROFILE = ClusterProfile.model_validate(
    {
        "name": "tiny",
        "namespace": "osctl",
        "image": "localhost/nothing:dev",
        "driver_image": "localhost/nothing:dev",
        "allow_unpinned": ("localhost/nothing:dev",),
        "device": "cpu-core",
        "gpu_resource": None,
        "cpu": "10m",
        "memory": "32Mi",
        "shm": "8Mi",
        "scratch": "16Mi",
        "save_s": 5,
        "lost_node_s": 60,
        "node_selector": {"osctl.test/no-such-node": "true"},
    }
)
"""Asks for a node that no cluster has: what is submitted stays pending."""


def intend(ledger: Ledger, number: int = 1, *, stage: str = "one", nodes: int = 1, epoch: int = 1) -> Intent:
    return ledger.create_intent(
        Intent(
            run_key=run_key(ledger.pipeline, stage, "0a1b2c3d4e5f", number),
            pipeline=ledger.pipeline,
            stage=stage,
            inputs_digest="0a1b2c3d4e5f",
            attempt=number,
            epoch=epoch,
            created=time.time(),
            config=CONFIG,
            config_digest=CONFIG.digest(),
            nodes=nodes,
            devices_per_node=1,
            device="cpu-core",
            trainer=(),
            hang_timeout_s=60,
            flush_s=1,
            parent=None,
            resume=None,
            code="0.1.0",
        )
    )
