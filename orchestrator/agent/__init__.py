"""The agent: the life of one attempt on one node, from a verified parent to a published result.

`python -m orchestrator.agent --store URL --intent KEY --run-dir DIR` is started by a backend, as a process or as PID 1 of a pod.
It brings checkpoints in, starts the trainer, publishes what the trainer leaves in the run directory, keeps the books of where the
time went, and turns the way the trainer ended into an exit code. It knows one intent and one run directory; it never decides
whether there is another attempt, and never needs torch.

    __main__         arguments, exit code
    start            the right to start
    attempt          the life: stage in, train, leave
    events           one place to wait: signals, the launcher's death, the guard, finished tasks
    guard            a process of its own that starts the trainer and outlives nobody
    trainer_process  the command line and environment of the trainer; talks to the guard
    run_directory    the agent's side of docs/contracts.md section 1
    publication      checkpoints to the store, as one node or as one of several
    standing         whether the attempt is still the one that counts, and signs that it lives
    upload_queue     uploads in the background, again and again until they succeed
    timeline         pure: what was observed -> journal pieces
    ending           pure: result.json and a wait status -> exit class
"""
