"""Scoring across ranks: the implementation of the context that a paper's ``score`` gets."""
