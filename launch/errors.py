"""What can go wrong in a run and its user can mend: one base class, so that a launcher prints one sentence for each."""


class LaunchError(Exception):
    """A failure whose message is a sentence for the user, who needs no traceback to act on it."""
