"""What exists: one TOML card a system, read without importing the system.

A card says what a paper offers and under which names. Its status is computed, never typed: see `Card.status`.
"""

from formwright.catalog.cards import CAPABILITIES, KINDS, STATUSES, Card, Claim, Provided, Status, read_card
from formwright.catalog.lookup import card, cards, find, provided, resolve, slots

__all__ = [
    "CAPABILITIES",
    "KINDS",
    "STATUSES",
    "Card",
    "Claim",
    "Provided",
    "Status",
    "card",
    "cards",
    "find",
    "provided",
    "read_card",
    "resolve",
    "slots",
]
