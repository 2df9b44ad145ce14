"""What diffusers and transformers say of files and casts is for their developers, not for who runs a command."""


def quiet_models() -> None:
    """Hide the bars that count a file's tensors, and warnings below errors."""
    from diffusers.utils import logging as logging_of_diffusers
    from transformers.utils import logging

    for each in (logging, logging_of_diffusers):
        each.disable_progress_bar()
    logging_of_diffusers.set_verbosity_error()
