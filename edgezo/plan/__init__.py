"""From a request to a plan: settings, conflicts, and every byte with its reason. Pure; without torch and numpy.

Every room above it calls it.
Read first: planner.py, then footprint.py.
"""
