"""One module per command; each is thin and imports what is heavy inside."""
