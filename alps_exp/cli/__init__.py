"""The command line, sweeps, and Hydra's launchers."""
