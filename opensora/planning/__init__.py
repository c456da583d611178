"""What a stage costs in operations and memory, before it runs. Without torch."""
