"""What a paper may ask, done across ranks."""
