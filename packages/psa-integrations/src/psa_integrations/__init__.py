"""Pyramid Sparse Attention."""
