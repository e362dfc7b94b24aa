"""What the lectures state, each statement with its source and what is found of it here."""
