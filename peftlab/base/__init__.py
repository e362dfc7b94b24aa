"""Base models: configs, shapes, weights found, fetched, verified, loaded and shared unchanged."""
