"""Compression from folder to folder: one block of the model in memory, and a run that goes on after a kill."""
