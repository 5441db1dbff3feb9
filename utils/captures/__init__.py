"""Captures: what a teacher said about texts, stored by DistillKit, read as a teacher and as text.

compression  DistillKit's two ways to store a position's most probable tokens, and which of it can be trusted
folder       a folder of captures: opened, checked, identified, and its documents
index        place of a window's tokens in the captured texts, found by content
source       CaptureSource: the lists of windows, and how a run comes by it
"""
