"""Import this before triton: scripts/setup puts it where nothing else looks, since PyTorch imports what it finds."""

from __future__ import annotations

import sys

sys.path.append(f"{sys.prefix}/triton")
