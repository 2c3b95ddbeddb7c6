"""Sparsity inside experts: weights that matter least become zero, or whole hidden units go."""
