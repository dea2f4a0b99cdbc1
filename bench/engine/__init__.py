"""One prefill, many methods: how documents are answered."""
