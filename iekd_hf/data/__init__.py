"""Images come in: decoded once, augmented a batch at a time."""
