"""Tables and pictures that compare methods."""
