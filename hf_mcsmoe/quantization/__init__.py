"""Experts in 8, 4, 3 or 2 bits: the values that a weight is rounded to, and how its error is kept small."""
