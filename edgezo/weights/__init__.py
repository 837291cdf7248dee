"""Weights as they are stored and changed: files, layouts, the one mutator, blocks on disk or in RAM.

network, run and bench call it.
Read first: store.py, the one place where an update is made.
"""
