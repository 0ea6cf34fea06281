"""Accuracy of a demo checkpoint on held-out questions: by weight format, guide, detail, CPU tier and part."""
