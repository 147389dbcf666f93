"""The parts of benchmarks/gpu.py, one file each: ``rows(device, seconds, done)`` yields figures as they come.

``done`` holds what was measured before: no row of that name is measured again.
"""
