"""Solvers, and what they are put together with: noise schedules, time grids, row-keyed noise."""
