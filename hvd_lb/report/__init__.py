"""What a run tells: metrics on disk, progress on the terminal, pictures and a page at the end."""
