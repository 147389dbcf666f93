"""Writer, reader and backend for FFCV files (.beton)."""
