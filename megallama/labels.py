"""What a label can say besides a token."""

IGNORED = -100
"""Label of a position that is left out of the loss; torch's own convention."""
