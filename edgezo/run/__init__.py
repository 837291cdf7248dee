"""A run from its request to its result: load, step, journal, snapshots, evaluate, export.

cli and bench call it, and programs through `edgezo.finetune`.
Read first: step.py, then train.py.
"""
