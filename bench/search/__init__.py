"""Settings of a method, searched."""
