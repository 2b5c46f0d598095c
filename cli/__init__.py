"""The command line: each command parses, calls hvd_lb and prints."""
