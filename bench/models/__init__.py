"""Models by reference: an embedded name, a local folder, a GGUF file or a hub id."""
