"""Bundles, ONNX, torch.export and the hub."""
