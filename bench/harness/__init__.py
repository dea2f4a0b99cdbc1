"""Tasks of lm-eval; the only importer of it."""
