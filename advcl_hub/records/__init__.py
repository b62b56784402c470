"""Results of evaluations: read, put in tables (tables.py), and the versions and hardware that they name (environment.py)."""

from advcl_hub.records.reading import RESULTS, autoattack_text, counted, in_markdown, load_record, pixels

__all__ = ["RESULTS", "autoattack_text", "counted", "in_markdown", "load_record", "pixels"]
