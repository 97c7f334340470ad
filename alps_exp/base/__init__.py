"""What every room may use: errors, checks, files, clocks, progress, devices. Nothing of pruning."""
