"""Finished datasets in the formats that trainers read: one table of formats, and one pass over the shards for all that are asked for.

A format is an entry of ``table.py``, and a function that makes a row's files; one file holds those of one trainer. What they are given
is an ``ExportRow``: it knows what the picture is called, its sizes, and its latents, scaled or not.
"""
