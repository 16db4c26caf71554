"""What a user can get wrong."""


class UserError(ValueError):
    """A mistake of the user's: one sentence with the offending value and the nearest legal fix.

    Commands print the sentence alone and leave with exit code 2; nothing has been written,
    unless a run was under way that ran out of memory.
    """


class NotFiniteError(UserError):
    """What a run has loaded cannot be trained on: a weight, a moment or the first loss is not finite."""
