"""Documents: a prompt that was read is kept on disk, and asked again without reading it anew."""
