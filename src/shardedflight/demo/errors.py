"""Why the demo cannot go on."""


class DemoError(Exception):
    """The demo ends here; the message is the one sentence that the user gets."""
