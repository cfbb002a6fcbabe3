"""
The command line: `cli` is `iekd-hf`, and a file for each subcommand holds its arguments and its `main`.

`run` holds what the subcommands that train share: resuming, networks to compare with, and the order of a run. `parser`
reads arguments and makes the texts in `help`, `terminal` and `progress` say what happens, and what is wrong.
`arguments`, `networks` and `packages` are smaller parts; `images` and `boxes` are the data, metrics and trainers of
classification and detection, and `report` the tables and pictures at the end. The library imports nothing from here.
"""
