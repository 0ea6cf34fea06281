"""The next demo model, of scenes of things that people know: pictures, questions and training.

``benchmarks/demo`` keeps its colored shapes until a model of these is trained and measured.
"""
