"""The parts of benchmarks/gpu.py, one file each: ``rows(device, seconds)`` yields figures as they come."""
