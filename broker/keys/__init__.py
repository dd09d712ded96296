"""Private keys and who may use them: a key is made here, signs here, and never leaves as bytes.

This room knows keys, not what they are for: profiles, rotation and publication belong to ``broker/server/authority``.
"""

from broker.keys.disk import DiskKeys
from broker.keys.memory import MemoryKeys
from broker.keys.signer import ALGORITHM, KeyManager, KeyName, Signer

__all__ = ["ALGORITHM", "DiskKeys", "KeyManager", "KeyName", "MemoryKeys", "Signer"]
