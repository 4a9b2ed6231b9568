"""What a run needs and takes, without running it."""
