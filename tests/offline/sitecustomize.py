"""Python runs this first in the processes that tests start: none of them may use the network."""
import socket

connect = socket.socket.connect


def reject(self, *args):
    """Worker processes use local connections."""
    if self.family in (socket.AF_INET, socket.AF_INET6):
        raise AssertionError("a test tried to use the network")
    return connect(self, *args)


socket.socket.connect = reject
