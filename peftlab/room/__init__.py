"""Who runs what: jobs and their logs, visitors, a host's settings, and the process that takes long work."""
