"""Parts of benchmarks/repair.py: networks and images, tables, speed, the study of shifted means."""
