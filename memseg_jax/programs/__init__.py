"""Compiled programs: which devices they are for, what they count, and what they cost."""
