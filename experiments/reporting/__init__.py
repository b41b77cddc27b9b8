"""Reports of sweeps: a page, tables, JSON; pictures of plans and films; the plot of a benchmark."""
