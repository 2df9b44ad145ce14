"""Errors that the user can fix."""


class UserError(ValueError):
    """Input or configuration that breaks a rule.

    The message names the rule, the offending value and, where there is one, the fix. The command line prints it
    without a traceback; a flow fails with it and does not retry.
    """


class VersionGoneError(UserError):
    """The requested version of a table no longer exists."""
