"""Measurements: peak memory, speed, accuracy and alignment, beside baselines as stock peft and PyTorch run them.

cli calls it; no run needs it.
Read first: speed.py, the shortest way through a step.
"""
