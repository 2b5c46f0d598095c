"""Who sees what, as pure functions: nothing here knows a process, a device or a file."""
