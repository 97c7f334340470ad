"""One HTML file from run records: sortable tables, plots that answer the mouse, every run's configuration."""
