"""The run folder, and a run into it."""
