"""Silence messages of diffusers and transformers that do not help the users of a command."""


def quiet_models() -> None:
    """Hide the progress bars of loading weights, and diffusers' warnings."""
    from diffusers.utils import logging as logging_of_diffusers
    from transformers.utils import logging

    for each in (logging, logging_of_diffusers):
        each.disable_progress_bar()
    logging_of_diffusers.set_verbosity_error()
