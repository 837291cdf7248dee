"""The computer: its memory and speed, the guard, files that are whole or absent, downloads, C kernels.

Every room calls it.
Read first: process_memory.py: what the memory cap bounds.
"""
