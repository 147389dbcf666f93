"""Attacks by kind: ``cases(seed, count)`` yields (label, what to call); a wrong outcome raises AssertionError.

A right outcome is the right answer, or a sentence (PruneError).
"""
