"""What a method declares that it needs; the class is in config/method_needs.py, which loads no torch."""

from dist_prune.config.method_needs import GRADIENTS, WEIGHTS_ALONE, Needs

__all__ = ["GRADIENTS", "WEIGHTS_ALONE", "Needs"]
