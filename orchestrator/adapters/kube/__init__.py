"""Kubernetes, over its REST API and with plain dicts: `api` asks it, `watch` keeps a picture of it, `backend` makes attempts live there."""
