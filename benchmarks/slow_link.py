"""Network namespaces on a slow link: every packet takes a while, and each namespace sends few bits a second.

The kernel's netem would do this, where it is there. Here a thread of this process hands packets on between one TUN
device in each namespace. It needs root and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DEVICE = "ezslow"  # in each namespace
_NET, _SET_DEVICE, _TUN, _BARE = 0x40000000, 0x400454CA, 0x0001, 0x1000
_DESTINATION = slice(16, 20)  # of an IPv4 packet


def enter(namespace: str) -> None:
    """Move this thread, and what it starts, into a network namespace."""
    _enter(Path("/run/netns", namespace))


def _enter(path: Path) -> None:
    with path.open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NET):
            raise OSError(ctypes.get_errno(), f"no way into {path}")


def _device(namespace: str) -> int:
    """The file of a new TUN device in a namespace, which is there as long as it is open."""
    here = Path("/proc/self/task", str(threading.get_native_id()), "ns/net")
    with here.open() as back:
        enter(namespace)
        try:
            made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(made, _SET_DEVICE, struct.pack("16sH22x", DEVICE.encode(), _TUN | _BARE))
        finally:
            ctypes.CDLL(None).setns(back.fileno(), _NET)
    return made


class SlowLink:
    """What carries packets between namespaces."""

    def __init__(self, devices: dict[bytes, int], bits_a_second: float, delay_s: float):
        self.devices, self.bits_a_second, self.delay_s = devices, bits_a_second, delay_s
        self.carried_bytes = self.packets = 0  # IP headers and all
        self._free_s = dict.fromkeys(devices.values(), 0.0)  # when each has sent what it had
        self._ends = False
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Carry no more."""
        self._ends = True
        self._thread.join()

    def _carry(self) -> None:
        waiting: list[tuple[float, int, bytes, int]] = []  # when, number, packet, to
        while not self._ends:
            wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.05
            for device in select.select([*self._free_s], [], [], min(wait_s, 0.05))[0]:
                packet = os.read(device, 1 << 16)
                to = self.devices.get(packet[_DESTINATION])
                if to is None or packet[0] >> 4 != 4:
                    continue
                sent_s = max(time.monotonic(), self._free_s[device])
                sent_s += 8 * len(packet) / self.bits_a_second
                self._free_s[device] = sent_s
                self.packets += 1
                self.carried_bytes += len(packet)
                heapq.heappush(waiting, (sent_s + self.delay_s, self.packets, packet, to))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, packet, to = heapq.heappop(waiting)
                with suppress(OSError):  # the device goes with its namespace
                    os.write(to, packet)


def _ip(words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words.split()], check=check)


@contextmanager
def namespaces(
    count: int, bits_a_second: float, delay_s: float
) -> Iterator[tuple[SlowLink, dict[str, str]]]:
    """A link, and the addresses of ``count`` namespaces by their names."""
    addresses = {f"ez-slow{number}": f"10.78.0.{number + 1}" for number in range(count)}
    devices: dict[bytes, int] = {}
    link = None
    try:
        for name, address in addresses.items():
            _ip(f"netns add {name}")
            devices[bytes(map(int, address.split(".")))] = _device(name)
            _ip(f"-n {name} addr add {address}/24 dev {DEVICE}")
            _ip(f"-n {name} link set {DEVICE} up")
            _ip(f"-n {name} link set lo up")
        link = SlowLink(devices, bits_a_second, delay_s)
        yield link, addresses
    finally:
        if link is not None:
            link.close()
        for device in devices.values():
            os.close(device)
        for name in addresses:
            _ip(f"netns del {name}", check=False)
