"""Measure how much the values of sites change, and make schedules from that."""
