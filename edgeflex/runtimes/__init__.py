"""Room: runtimes."""
