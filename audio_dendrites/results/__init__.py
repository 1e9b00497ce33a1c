"""Metrics, statistics, finished runs, tables and plots."""
