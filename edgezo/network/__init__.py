"""The model: its files, its modules with perturbed operations, losses, heads and backward passes.

run and bench call it.
Read first: perturb.py: how a direction enters a forward pass.
"""
