"""Rows on disk become batches of token sequences, and predictions become figures.

plan and every room above it call it.
Read first: dataset.py.
"""
