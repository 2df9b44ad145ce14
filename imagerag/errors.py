"""What is the user's to mend."""


class UserError(ValueError):
    """Input or configuration that breaks a rule.

    The message names the rule, the offending value and, where there is one, the way out. The command line prints it
    without a traceback; a flow fails with it and does not retry.
    """


class VersionGoneError(UserError):
    """The version of a table that was asked for is there no more."""
