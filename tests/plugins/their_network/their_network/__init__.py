"""A network of a third party."""
