"""Tools for the project itself: generated docs pages, GPU checks, tiny models, the baselines of memory tests."""
