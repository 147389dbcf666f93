"""FFCV: reading, writing, encoding .beton files."""
