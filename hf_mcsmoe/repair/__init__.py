"""Repair of merged layers against the original ones."""
