"""The `hf-msn` command: one parser, one file per command, recipes."""
