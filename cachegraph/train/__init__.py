"""Routers learned for a model and a number of steps: HarmoniCa and Learning-to-Cache."""
