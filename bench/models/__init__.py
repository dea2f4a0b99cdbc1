"""Models by reference."""
