"""Processes that hold stages: in this process, or on Ray's nodes."""
