"""What numbers say: intervals, tests, comparisons."""
