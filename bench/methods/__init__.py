"""Cache methods: what a cell of the grid can be."""
