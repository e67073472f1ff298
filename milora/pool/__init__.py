"""Many registered adapters in fixed memory; `AdapterPool` is what a user calls.

layout     which runs of bytes an adapter of a configuration needs, without its weights
sources    where weights come from: a folder, or tensors in memory
packing    a source -> one packed blob in host memory
host       the blobs, under the host budget
memory     the pool tensor and the tables that kernels read, under the device budget
copies     blob -> pool, and inside the pool; on CUDA beside the forwards
space      slots and bytes: what fits, eviction, compaction
gate       forwards on one side, moving bytes on the other
residency  which adapters are where, for many threads: loading, leases
prefetch   loading in the background
pool       the public face
"""

from __future__ import annotations

from milora.pool.entry import PoolStats
from milora.pool.pool import AdapterPool, Lease

__all__ = ["AdapterPool", "Lease", "PoolStats"]
