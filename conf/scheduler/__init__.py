"""Solvers and their grids."""
