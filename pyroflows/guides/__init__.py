"""Variational guides made of flows."""

from pyroflows.guides.autoflow import AutoFlow

__all__ = ["AutoFlow"]
