"""What a run is: its settings by section, how overrides are laid over them, and what is refused."""
