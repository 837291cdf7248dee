"""The computer: its memory and speed, the guard of the memory cap, files, downloads, C kernels.

Every room calls it.
Read first: process_memory.py, what the memory cap bounds.
"""
