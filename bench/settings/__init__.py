"""What a command can be told."""
