"""Zhao and Wu 2019, equations 1 and 2: those of squeeze-and-excitation."""

from tests.definitions.squeeze_excitation import element

__all__ = ["element"]
