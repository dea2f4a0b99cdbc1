"""Reading and writing files: one module per format, used by everything else."""
