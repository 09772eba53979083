"""Stages that score pictures, in columns of the dataset, and filter rows by their scores."""
