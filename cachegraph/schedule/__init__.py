"""Schedules: what was asked for, and the plan that follows from it for a model."""
