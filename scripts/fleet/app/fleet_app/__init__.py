"""The two apps of a fleet."""
