"""Measurements: peak memory, speed, accuracy and alignment, beside baselines with stock peft and PyTorch.

cli calls it; no run needs it.
Read first: speed.py, the shortest way through a step.
"""
