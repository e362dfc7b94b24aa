"""`python -m peftlab`: the command line of `peftlab.cli`."""

from .cli import console

if __name__ == "__main__":
    console()
