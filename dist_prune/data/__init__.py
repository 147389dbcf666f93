"""Image data: data sets, samplers, transforms, and the backends that load batches."""
