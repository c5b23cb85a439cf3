"""Compiled attention: C for CPUs, Triton for GPUs."""
