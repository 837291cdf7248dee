"""The mathematics of zeroth-order training: noise, directions, masks, credit, rules, and the table of presets.

weights and every room above it call it; presets.py is also read by plan.
Read first: credit.py, then directions.py.
"""
