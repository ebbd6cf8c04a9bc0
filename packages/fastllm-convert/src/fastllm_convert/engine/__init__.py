"""Executes a plan: bytes go from source files to their final place, once, in bounded memory."""
