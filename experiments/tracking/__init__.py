"""Runs on disk and in MLflow: result files and their schema, identity, provenance, stored arrays."""
