"""Dirichlet switches: channels times a vector on the simplex, whose posterior is trained with the weights frozen."""

from dist_prune.methods.dirichlet.method import DirichletSwitches

__all__ = ["DirichletSwitches"]
