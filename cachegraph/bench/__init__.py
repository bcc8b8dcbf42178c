"""Time schedules and backends against the uncached model."""
