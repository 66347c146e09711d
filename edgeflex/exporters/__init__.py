"""Room: exporters."""
