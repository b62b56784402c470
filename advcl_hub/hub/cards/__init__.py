"""Model cards from results.json, made anew whenever they are needed: only the notes are written by hand."""

from advcl_hub.hub.cards.provenance import pretraining
from advcl_hub.hub.cards.results import add_to_results, read_export
from advcl_hub.hub.cards.text import card, summary, write_card

__all__ = ["add_to_results", "card", "pretraining", "read_export", "summary", "write_card"]
