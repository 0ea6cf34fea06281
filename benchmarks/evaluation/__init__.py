"""``fusion-eval``: accuracy, agreement with a reference, calibration and latency of a model on a file of samples."""
