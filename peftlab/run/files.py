"""What lies in a run's folder beside its adapter."""

STOP = "stop"
"""A file of this name in a run's folder ends the run after the step in progress. It is a file because the worker process
that trains on a shared GPU has nothing else in common with the page."""
LEAVE = "leave"
"""A file of this name ends the run after the step in progress with a checkpoint alone, to go on another time."""
CHECKPOINT = "checkpoint.safetensors"
"""Where a run is, to go on from there."""
