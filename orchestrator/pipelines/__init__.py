"""What a person does with a pipeline: find it, plan it, launch it, watch it, account for it. `orchestrator.api` and `osctl` call it.

Nothing here prints, ends the process, handles signals or changes the environment: two launches may run in two threads of one process.
"""
