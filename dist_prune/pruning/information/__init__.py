"""Entropies and mutual information of activations, and backward elimination of filters by them."""
