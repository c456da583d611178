"""Run attempts as jobs of a Kubernetes cluster: write an object from an intent, send it, and observe what becomes of it.

Writing objects: `names`, `parts`, `trainer_pod`, `operator` (an attempt, of each kind of job), `manifest` (PyTorchJob), `jobs` (a driver),
`diff`, `yaml_text`. Observing: `watch`, `watch_cache`, `observed`, `life`. Requests to the API server: `login`, `client`, `faults`,
`attempt_objects`, `backend`.
"""
