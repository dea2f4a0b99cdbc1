"""Settings of a method, searched on some documents and judged on others."""
