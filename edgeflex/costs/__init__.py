"""Room: costs."""
