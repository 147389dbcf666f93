"""Parts of benchmarks/which_method.py: settings of the methods, networks and images, tables."""
