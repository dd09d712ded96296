"""What the public socket tells of its services. Nothing of it is the agent's own: see :mod:`broker.transport.reflection`."""

from broker.transport.reflection import V1, V1ALPHA, Catalogue, ReflectionApi

__all__ = ["V1", "V1ALPHA", "Catalogue", "ReflectionApi"]
