"""What Flower loads on the server."""

from edgezo.run.flower import server_app

__all__ = ["server_app"]
