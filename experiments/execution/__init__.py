"""Running cells and encodings: in this process, in several, on SLURM or on Ray; checkpoints, signals, progress."""
