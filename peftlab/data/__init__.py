"""What runs learn from: tasks, their rows and their metrics."""
