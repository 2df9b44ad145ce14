"""One Prefect task a stage: retries, progress, one call into `imagerag`."""
