"""Sums of numbers that whoever adds them cannot read: CKKS (eprint 2016/421) by TenSEAL, on bytes and NumPy alone.

Nothing here loads torch, so that a process can read a stranger's ciphertexts and nothing else.
"""
