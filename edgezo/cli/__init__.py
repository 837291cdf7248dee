"""The command line: it parses, prints and maps errors to exit codes.

Nobody imports it; `edgezo` and `python -m edgezo` start here.
Read first: main.py.
"""
