"""Compiled loops as folders: saved, loaded, checked."""
