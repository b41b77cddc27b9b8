"""Sweeps: files, grids of cells, budgets, and the checks before the first cell runs."""
