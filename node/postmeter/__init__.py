"""Postmeter: caps how much mail a sender may send through a cluster of Postfix servers."""

__version__ = "0.1.0"
