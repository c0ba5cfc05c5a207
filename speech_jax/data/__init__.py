"""From files to batches, in numpy on the host: sources, decoding, text, plan, loader."""
