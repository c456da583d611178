"""From an intent and a cluster profile to the objects that are sent to Kubernetes. Pure, and the only place where one is written.

Owns names, labels and annotations of everything that osctl makes in a cluster. Refuses to talk to one, and to hold a secret.
"""

from __future__ import annotations
