"""Solvers, and what they are put together with: noise paths, time grids, row-keyed noise."""
