"""One file per way to choose, and the registry of methods."""
