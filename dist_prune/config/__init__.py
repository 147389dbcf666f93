"""Recipes: their sections and keys, read from files and the command line. Imports no torch."""
