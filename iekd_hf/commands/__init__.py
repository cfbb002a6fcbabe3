"""The command line: a file for each subcommand of `iekd-hf`, and folders for the parts they share."""
