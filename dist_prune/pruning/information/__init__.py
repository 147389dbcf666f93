"""Entropies and information of activations."""
