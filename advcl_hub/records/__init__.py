"""What a result says: records of evaluations, read and put in tables, and the versions and hardware that they name."""

from advcl_hub.records.environment import backends, hardware, versions
from advcl_hub.records.reading import RESULTS, autoattack_text, load_record, pixels
from advcl_hub.records.tables import report

__all__ = ["RESULTS", "autoattack_text", "backends", "hardware", "load_record", "pixels", "report", "versions"]
