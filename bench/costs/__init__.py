"""What a cache costs: time, memory."""
