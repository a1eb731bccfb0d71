"""What the tests draw with; the strategies themselves are published."""

from refattn.strategies import HypothesisDraw

__all__ = ["HypothesisDraw"]
