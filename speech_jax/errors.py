"""The one base of errors that a person at the command line can mend."""


class UserError(ValueError):
    """Its message is a sentence that names the thing and the cure; main prints it alone."""
