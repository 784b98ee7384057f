"""Audited weights for others: ``python -m dynat.publish digits/dynat/0 --as onnx DIR``."""
