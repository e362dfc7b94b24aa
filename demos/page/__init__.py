"""The page: the one store of its settings, and what its tabs are built of."""
