"""What Flower loads on a device, once for each message."""

from edgezo.run.flower_device import client_app

__all__ = ["client_app"]
