"""The optimizer.

update.py     the update as one pure function
split_lbi.py  `SplitLBI`, the class that loops; what its param groups may hold is in checks.py
kernel.py     what carries a step out: plain.py (tensor operations), fused_cpu.py (C++ loop), fused_gpu.py (compiled)
prox.py       norms and proximal maps of units that span tensors; sharding.py: tensors that FSDP2 shards
schedule.py   how long the path of a run is
"""
