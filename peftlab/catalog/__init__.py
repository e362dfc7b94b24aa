"""Facts as data, each with its source: base models, GPUs, papers. To add one, add a line to the JSON beside this file."""
