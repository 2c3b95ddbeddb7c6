"""One page of pictures of results: read from their folders without weights, drawn as SVG, written as one file."""
