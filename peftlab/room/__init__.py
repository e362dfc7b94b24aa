"""Who runs what: jobs, their event logs, and the process that takes long work."""
