"""Time and dollars of a run: planned before it, and added up from journals after it.

`node_fold` adds up a journal, `history` reads a ledger's attempts, `cost` makes a bill, `status` says what a pipeline is doing. `plan`,
`size_plan` and `speed` estimate before a run.
"""
