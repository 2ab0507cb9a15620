"""What leaves the process: `files` writes folders and files whole, `terminal` writes lines for people."""
